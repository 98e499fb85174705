"""Can one 4-bit base carry several adapters? Trains two, switches, combines them, deletes one and merges the other.

    python examples/several_adapters.py --tiny                  # a random model of two small layers
    python examples/several_adapters.py --model path/to/model   # a transformers checkpoint

One adapter learns to answer "yes", the other "no", each with layers and a rank of its own. The table shows the loss of
every adapter on both tasks. The base is not changed: its bytes are hashed before and after. The last line is one JSON
object; the exit status is 1 if a promise does not hold.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from qlora_lite import LoraConfig, QuantConfig, TrainConfig, load_quantized, merge_lora_, save_adapter, train
from qlora_lite.checkpoints import load_tokenizer
from qlora_lite.data import batches, tokenize_all
from qlora_lite.lora import (
    active_adapter,
    adapter_names,
    adapters_disabled,
    add_adapter_,
    combine_adapters_,
    delete_adapter_,
    use_adapter_,
)

QUESTIONS = ["is it so? ", "and this? ", "really? ", "are you sure? "]
ADAPTERS = {
    "yes": LoraConfig(rank=8, alpha=16, target_modules="all-linear"),
    "no": LoraConfig(rank=4, alpha=16, target_modules=["q_proj", "v_proj", "down_proj"]),
}
ROW = "{:<16}{:>12}{:>12}"


def base_digest(model: Any) -> str:
    """Returns a hash of every tensor of the model that does not belong to an adapter."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if "lora_" not in name:
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def losses(model: Any, tasks: dict[str, Any]) -> dict[str, float]:
    """Returns the loss of the model on each task, with the adapter in use."""
    model.eval()
    return {name: float(model(**batch).loss) for name, batch in tasks.items()}


def run(folder: Path, output: Path, steps: int) -> dict[str, Any]:
    """Runs all steps in order, and prints a row for each state of the model."""
    tokenizer = load_tokenizer(folder)
    model: Any = load_quantized(folder, QuantConfig(format="nf4", double_quant=True))
    before = base_digest(model)
    tasks: dict[str, Any] = {}
    seen: dict[str, dict[str, float]] = {}

    def show(state: str) -> None:
        seen[state] = losses(model, tasks)
        print(ROW.format(state, *(f"{seen[state][task]:.3f}" for task in ADAPTERS)))

    for name, config in ADAPTERS.items():
        records = [{"prompt": question, "completion": name} for question in QUESTIONS]
        examples = tokenize_all(records, tokenizer).examples
        tasks[name] = next(batches(examples, len(examples), seed=0, pad_token_id=tokenizer.pad_token_id))
        add_adapter_(model, name, config)  # now the adapter in use, and the only one that is trained
        train(model, [tasks[name]], TrainConfig(steps=steps, learning_rate=1e-2), progress=False)
    print(ROW.format("in use", *(f"on {task!r}" for task in ADAPTERS)))
    with adapters_disabled(model):
        show("none")
    for name in ADAPTERS:
        use_adapter_(model, name)
        show(name)
    combine_adapters_(model, {"yes": 0.5, "no": 0.5}, "half-half")
    show("half-half")
    save_adapter(model, output / "yes", name="yes", overwrite=True)  # any adapter can be saved, in use or not
    delete_adapter_(model, "half-half")
    delete_adapter_(model, "yes")
    print(f"left: {adapter_names(model)}, in use: {active_adapter(model)}")
    merge_lora_(model, name="no")
    show("no, merged")
    return {"losses": seen, "base_unchanged": base_digest(model) == before}


def broken_promises(figures: dict[str, Any]) -> list[str]:
    """Returns the promises that do not hold."""
    seen = figures["losses"]
    promises = {
        "the bytes of the base are unchanged": figures["base_unchanged"],
        "each adapter has a lower loss on its task than the base and the other adapter": all(
            seen[own][own] < min(seen["none"][own], seen[other][own]) for own, other in (("yes", "no"), ("no", "yes"))
        ),
        "a merged adapter keeps its loss": abs(seen["no, merged"]["no"] - seen["no"]["no"]) < 0.05,
    }
    return [promise for promise, holds in promises.items() if not holds]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of a transformers checkpoint")
    parser.add_argument("--output", type=Path, default=Path("out/several_adapters"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tiny", action="store_true", help="a random model instead of --model")
    given = parser.parse_args()
    if given.tiny == (given.model is not None):
        parser.error("give either --model or --tiny")
    with tempfile.TemporaryDirectory() as scratch:
        if given.tiny:
            from tiny_model import make_tiny_model

            given.model = make_tiny_model(Path(scratch) / "model")
        figures = run(given.model, given.output, given.steps)
    broken = broken_promises(figures)
    print(json.dumps(figures))
    if broken:
        raise SystemExit(f"error: these promises do not hold: {'; '.join(broken)}")


if __name__ == "__main__":
    main()
