"""trl's SFTTrainer on a 4-bit base: three lines differ from a script of transformers, peft and trl.

    python examples/sft_with_trl.py            # SmolLM2-135M-Instruct, two minutes on two cores
    python examples/sft_with_trl.py --tiny     # a random model of two small layers, seconds

The model learns to turn a short message into a JSON record (message_records.py). Only the answers are learned. Prints
the losses on held-out messages and the files of the checkpoint, and loads its adapter. The last line is one JSON
object; the exit status is 1 if the loaded adapter is another one than the trained one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import trl
from datasets import Dataset

from message_records import generate, prompt_messages
from qlora_lite import QuantConfig, load_quantized  # instead of transformers' AutoModelForCausalLM
from qlora_lite.checkpoints import load_tokenizer
from qlora_lite.integrations import load_peft_model
from qlora_lite.integrations.trl import SFTTrainer  # instead of trl.SFTTrainer
from real_model import fetch_model
from tiny_model import make_tiny_model


def rows(split: str, count: int) -> Dataset:
    """Returns conversations in the form that trl learns the answers of."""
    examples = generate(split, count, seed=0)
    return Dataset.from_list(
        [{"prompt": prompt_messages(example), "completion": example["messages"][-1:]} for example in examples]
    )


def run(folder: Path, output: Path, steps: int) -> dict[str, Any]:
    """Trains, loads the adapter of the checkpoint, and returns the figures of the last line."""
    model: Any = load_quantized(folder, QuantConfig(double_quant=True))  # instead of from_pretrained(...)
    trainer = SFTTrainer(
        model,
        args=trl.SFTConfig(
            str(output),
            max_steps=steps,
            save_steps=steps,
            logging_steps=1,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            max_length=256,
            bf16=False,
            disable_tqdm=True,
            report_to=[],
        ),
        train_dataset=rows("train", 2 * steps),
        eval_dataset=rows("heldout", 4),
        processing_class=load_tokenizer(folder),
        peft_config=peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    checkpoint = output / f"checkpoint-{steps}"
    sizes = {file.name: file.stat().st_size for file in checkpoint.iterdir()}
    print("\n".join(f"{size:>12,}  {checkpoint.name}/{name}" for name, size in sorted(sizes.items())))
    again = load_peft_model(load_quantized(folder, QuantConfig(double_quant=True)), checkpoint)
    found, expected = (peft.get_peft_model_state_dict(adapted) for adapted in (again, trainer.model))
    return {
        "loss_before": before,
        "loss_after": after,
        "loaded_equal": all(torch.equal(found[name], value) for name, value in expected.items()),
        "adapter_bytes": sizes["adapter_model.safetensors"],
        "checkpoint_bytes": sum(sizes.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a random model instead of the real one")
    parser.add_argument("--output", type=Path, default=Path("out/sft_with_trl"), help="folder of the checkpoint")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_tiny_model(Path(scratch) / "model") if given.tiny else fetch_model()
        figures = run(folder, given.output, 3 if given.tiny else 12)
    print(json.dumps(figures))
    if not figures["loaded_equal"]:
        raise SystemExit("error: the adapter of the checkpoint is another one than the trained one")


if __name__ == "__main__":
    main()
