"""Fine-tunes a model in 4 bits: a JSONL file in, an adapter and a merged fp16 checkpoint out.

    python examples/finetune_4bit.py --model path/to/model --data data.jsonl --output out
    python examples/finetune_4bit.py --tiny        # a random model and eight generated lines

The last line is one JSON object with `first_loss`, `last_loss` and the two folders.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from qlora_lite import (
    LoraConfig,
    QuantConfig,
    TrainConfig,
    add_lora_,
    export_merged,
    load_quantized,
    save_adapter,
    train,
)
from qlora_lite.checkpoints import load_tokenizer
from qlora_lite.data import batches, tokenize_sources


def fine_tune(model_folder: Path, data: Path, output: Path, steps: int) -> dict[str, object]:
    """Loads the model as NF4, trains, saves the adapter and exports the merged model."""
    tokenizer = load_tokenizer(model_folder)
    examples = tokenize_sources([data], tokenizer).examples
    model = load_quantized(model_folder, QuantConfig(format="nf4", double_quant=True))
    add_lora_(model, LoraConfig(rank=16, alpha=32, target_modules="all-linear"))
    stream = batches(examples, batch_size=2, seed=0, pad_token_id=tokenizer.pad_token_id)
    result = train(model, stream, TrainConfig(steps=steps, learning_rate=5e-4))
    save_adapter(model, output / "adapter", overwrite=True)
    export_merged(model, output / "merged", dtype=torch.float16, overwrite=True)
    folders = {"adapter": str(output / "adapter"), "merged": str(output / "merged")}
    return {"first_loss": result.losses[0], "last_loss": result.losses[-1], **folders}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of a transformers checkpoint")
    parser.add_argument("--data", type=Path, help="JSONL: messages, prompt/completion, instruction/output or text")
    parser.add_argument("--output", type=Path, default=Path("out/finetune_4bit"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="a random model and eight generated lines")
    given = parser.parse_args()
    if not given.tiny and (given.model is None or given.data is None):
        parser.error("give --model and --data, or --tiny")
    with tempfile.TemporaryDirectory() as scratch:
        if given.tiny:
            from tiny_model import make_tiny_model

            given.model, given.data = make_tiny_model(Path(scratch) / "model"), Path(scratch) / "data.jsonl"
            lines = [
                json.dumps({"prompt": f"count to {n}: ", "completion": " ".join("123456789"[:n])}) for n in range(1, 9)
            ]
            given.data.write_text("\n".join(lines), encoding="utf-8")
        print(json.dumps(fine_tune(given.model, given.data, given.output, given.steps)))


if __name__ == "__main__":
    main()
