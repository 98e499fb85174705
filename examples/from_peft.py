"""Moves an adapter from peft to this library and back: does it compute the same on both sides?

    python examples/from_peft.py --tiny                  # a random model of two small layers
    python examples/from_peft.py --model path/to/model   # a transformers checkpoint, in fp32

Trains a few steps with peft (`pip install peft`), loads the adapter here, trains on, and loads the result in peft. The
logits of both sides are compared after each passage. The last line is one JSON object; the exit status is 1 if they
differ.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from qlora_lite import QuantConfig, TrainConfig, load_adapter_, load_quantized, save_adapter, train
from qlora_lite.lora import adapters_disabled

TOLERANCE = 1e-4
LEARNING_RATE = 5e-3


def base_for_peft(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train_with_peft(folder: Path, batch: dict[str, torch.Tensor], steps: int) -> tuple[Any, list[float]]:
    """Trains a peft model in a plain loop, and returns it with the losses."""
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base_for_peft(folder), config)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=LEARNING_RATE)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


@torch.no_grad()
def difference(ours: Any, theirs: Any, batch: dict[str, torch.Tensor]) -> float:
    """Returns the largest difference of logits, as a share of the largest logit."""
    got, expected = (model.eval()(batch["input_ids"]).logits for model in (ours, theirs))
    return float((got - expected).abs().max() / expected.abs().max())


def run(folder: Path, output: Path, steps: int) -> dict[str, float]:
    """Takes an adapter from peft to this library and back, and prints the result of each passage."""
    import peft

    tokens = torch.arange(6, 38).view(2, 16)
    batch = {"input_ids": tokens, "labels": tokens}
    theirs, losses = train_with_peft(folder, batch, steps)
    theirs.save_pretrained(output / "from_peft")
    print(f"peft:    {steps} steps, loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    # QuantConfig(format="nf4") would train in 4 bits. Without packing, the logits can be compared with peft's.
    ours: Any = load_quantized(folder, QuantConfig(format="none"), dtype=torch.float32)
    load_adapter_(ours, output / "from_peft")
    arrived = difference(ours, theirs, batch)
    with adapters_disabled(ours):
        without = difference(ours, theirs, batch)
    print(f"here:    the same adapter, logits differ by {arrived:.1e} (without it by {without:.1e})")
    result = train(ours, [batch], TrainConfig(steps=steps, learning_rate=LEARNING_RATE), progress=False)
    save_adapter(ours, output / "from_here", overwrite=True)
    print(f"here:    {steps} more steps, loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f}")

    back = peft.PeftModel.from_pretrained(base_for_peft(folder), output / "from_here")
    returned = difference(ours, back, batch)
    print(f"in peft: the adapter trained here, logits differ by {returned:.1e}")
    return {
        "peft_first_loss": losses[0],
        "peft_last_loss": losses[-1],
        "first_loss": result.losses[0],
        "last_loss": result.losses[-1],
        "difference_without": without,
        "difference_here": arrived,
        "difference_back": returned,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of a transformers checkpoint")
    parser.add_argument("--output", type=Path, default=Path("out/from_peft"))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a random model instead of --model")
    given = parser.parse_args()
    if given.tiny == (given.model is not None):
        parser.error("give either --model or --tiny")
    if importlib.util.find_spec("peft") is None:
        raise SystemExit("error: this example trains with peft, which is not installed: pip install peft")
    with tempfile.TemporaryDirectory() as scratch:
        if given.tiny:
            from tiny_model import make_tiny_model

            given.model = make_tiny_model(Path(scratch) / "model")
        figures = run(given.model, given.output, given.steps)
    print(json.dumps(figures))
    if max(figures["difference_here"], figures["difference_back"]) > TOLERANCE:
        raise SystemExit(f"error: the logits differ by more than {TOLERANCE:.0e}; see the lines above")
    if figures["last_loss"] >= figures["peft_first_loss"]:
        raise SystemExit("error: the loss did not fall; see the lines above")


if __name__ == "__main__":
    main()
