"""transformers' Trainer on a 4-bit base: how large are its checkpoints, and does a resumed run end with the same bits?

    python examples/trainer.py            # SmolLM2-135M-Instruct, two minutes on two cores
    python examples/trainer.py --tiny     # a random model of two small layers, seconds

The model is loaded packed, adapted by `add_lora_` and fused; the trainer is `AdapterTrainer`, and everything else is as
for any model of transformers. A second model resumes from the checkpoint in the middle of the run. The last line is one
JSON object; the exit status is 1 if the two models differ.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from message_records import generate
from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized
from qlora_lite.checkpoints import load_tokenizer
from qlora_lite.data import tokenize_all
from qlora_lite.integrations import AdapterTrainer
from qlora_lite.lora import adapter_parameters
from qlora_lite.training.forward import fuse_
from real_model import fetch_model
from tiny_model import make_tiny_model


def make_trainer(folder: Path, output: Path, steps: int) -> AdapterTrainer:
    """Returns a trainer of new adapters on generated messages, with two checkpoints on its way."""
    tokenizer = load_tokenizer(folder)
    model: Any = load_quantized(folder, QuantConfig(format="nf4", double_quant=True))
    add_lora_(model, LoraConfig(rank=16, alpha=32, target_modules="all-linear"))
    fuse_(model)  # Trainer's gradient_checkpointing would set it too
    tokenized = tokenize_all(generate("train", 2 * steps, seed=0), tokenizer).examples
    rows = [{"input_ids": list(row.input_ids), "labels": list(row.labels)} for row in tokenized]
    arguments = transformers.TrainingArguments(
        str(output),
        max_steps=steps,
        save_steps=steps // 2,
        logging_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        disable_tqdm=True,
        report_to=[],
    )
    collator = transformers.DataCollatorForSeq2Seq(tokenizer)  # pads labels too
    return AdapterTrainer(model, arguments, collator, train_dataset=rows)


def run(folder: Path, output: Path, steps: int) -> dict[str, Any]:
    """Trains, resumes another model from the middle, and returns the figures of the last line."""
    whole = make_trainer(folder, output, steps)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    middle = output / f"checkpoint-{steps // 2}"
    sizes = {file.name: file.stat().st_size for file in middle.iterdir()}
    print("\n".join(f"{size:>12,}  {middle.name}/{name}" for name, size in sorted(sizes.items())))
    resumed = make_trainer(folder, output, steps)
    resumed.train(resume_from_checkpoint=str(middle))
    expected, found = adapter_parameters(whole.model), adapter_parameters(resumed.model)
    return {
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "adapter_bytes": sizes["adapter_model.safetensors"],
        "checkpoint_bytes": sum(sizes.values()),
        "resumed_equal": all(torch.equal(found[name], value) for name, value in expected.items()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a random model instead of the real one")
    parser.add_argument("--output", type=Path, default=Path("out/trainer"), help="folder of the checkpoints")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_tiny_model(Path(scratch) / "model") if given.tiny else fetch_model()
        figures = run(folder, given.output, 4 if given.tiny else 12)
    print(json.dumps(figures))
    if not figures["resumed_equal"]:
        raise SystemExit("error: the resumed run ended with other adapters")


if __name__ == "__main__":
    main()
