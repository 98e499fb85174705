"""trl's DPOTrainer on a 4-bit base that is in memory once: the reference is the base with its adapters switched off.

    python examples/dpo_with_trl.py            # SmolLM2-135M-Instruct, some minutes on two cores
    python examples/dpo_with_trl.py --tiny     # a random model of two small layers, seconds

The model learns to prefer the JSON record of a message to that of another message (message_records.py). Three lines
differ from a script of transformers, peft and trl. Before the first update the model is the reference, so the first
loss is ln 2. The last line is one JSON object; the exit status is 1 if the loss does not begin there and fall.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import peft
import trl
from datasets import Dataset

from message_records import generate, prompt_messages
from qlora_lite import QuantConfig, load_quantized  # instead of transformers' AutoModelForCausalLM
from qlora_lite.checkpoints import load_tokenizer
from qlora_lite.integrations.trl import DPOTrainer  # instead of trl.DPOTrainer
from real_model import fetch_model
from tiny_model import make_tiny_model


def preferences(count: int) -> Dataset:
    """Returns pairs of answers to messages: the right record, and the record of the message before."""
    examples = generate("train", count, seed=0)
    return Dataset.from_list(
        [
            {
                "prompt": prompt_messages(example),
                "chosen": example["messages"][-1:],
                "rejected": before["messages"][-1:],
            }
            for before, example in zip([examples[-1], *examples], examples, strict=False)
        ]
    )


def run(folder: Path, output: Path, steps: int, pairs: int) -> dict[str, Any]:
    """Trains, prints how the rewards part, and returns the figures of the last line."""
    model: Any = load_quantized(folder, QuantConfig(double_quant=True))  # instead of from_pretrained(...)
    trainer = DPOTrainer(
        model,
        args=trl.DPOConfig(
            str(output),
            max_steps=steps,
            save_strategy="no",
            logging_steps=1,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            max_length=256,
            bf16=False,
            disable_tqdm=True,
            report_to=[],
        ),
        train_dataset=preferences(pairs),
        processing_class=load_tokenizer(folder),
        peft_config=peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()  # the adapter, in peft's files
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    print("step      loss    reward of chosen - rejected")
    for entry in log:
        print(f"{entry['step']:>4}{entry['loss']:>10.4f}{entry['rewards/margins']:>10.4f}")
    return {"losses": [entry["loss"] for entry in log], "files": sorted(file.name for file in output.iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a random model instead of the real one")
    parser.add_argument("--output", type=Path, default=Path("out/dpo_with_trl"), help="folder of the adapter")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_tiny_model(Path(scratch) / "model") if given.tiny else fetch_model()
        figures = run(folder, given.output, steps=4 if given.tiny else 12, pairs=2 if given.tiny else 24)
    print(json.dumps(figures))
    if abs(figures["losses"][0] - math.log(2)) > 1e-6:
        raise SystemExit(f"error: the first loss should be ln 2 = {math.log(2):.7f}; got {figures['losses'][0]:.7f}")
    if figures["losses"][-1] >= figures["losses"][0]:
        raise SystemExit("error: the loss did not fall; see the lines above")


if __name__ == "__main__":
    main()
