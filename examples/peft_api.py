"""peft's own API on a 4-bit base: are two adapters trained, switched, saved, loaded and merged as on any other model?

    python examples/peft_api.py            # SmolLM2-135M-Instruct, a minute on two cores
    python examples/peft_api.py --tiny     # a random model of two small layers, seconds

The adapters answer the same questions, one with "yes" and one with "no". Only the import of `get_peft_model` and the
loading differ from a script of peft. Prints the loss of each state of the model on both tasks. The last line is one
JSON object; the exit status is 1 if a promise does not hold.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch

from qlora_lite import QuantConfig, load_quantized
from qlora_lite.checkpoints import load_tokenizer
from qlora_lite.data import batches, tokenize_all
from qlora_lite.integrations import get_peft_model, load_peft_model  # instead of peft's
from qlora_lite.training.forward import fuse_
from real_model import fetch_model
from tiny_model import make_tiny_model

QUESTIONS = ["is it so? ", "and this? ", "really? ", "are you sure? "]
TARGETS = {"yes": "all-linear", "no": ["q_proj", "v_proj", "down_proj"]}
ROW = "{:<16}{:>12}{:>12}"


def task(answer: str, tokenizer: Any) -> dict[str, torch.Tensor]:
    """Returns a batch of all questions with this answer."""
    examples = tokenize_all([{"prompt": question, "completion": answer} for question in QUESTIONS], tokenizer).examples
    return next(batches(examples, len(examples), seed=0, pad_token_id=tokenizer.pad_token_id))


def learn(model: Any, batch: dict[str, torch.Tensor], steps: int) -> None:
    """Trains the active adapter in a plain loop."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def run(folder: Path, output: Path, steps: int) -> dict[str, dict[str, float]]:
    """Runs all steps in order, and returns the losses of each state of the model on both tasks."""
    tokenizer, seen = load_tokenizer(folder), dict[str, dict[str, float]]()
    tasks = {answer: task(answer, tokenizer) for answer in TARGETS}

    @torch.no_grad()
    def show(state: str, model: Any) -> None:
        seen[state] = {name: model.eval()(**batch).loss.item() for name, batch in tasks.items()}
        print(ROW.format(state, *(f"{loss:.3f}" for loss in seen[state].values())))

    base: Any = load_quantized(folder, QuantConfig(format="nf4", double_quant=True))
    fuse_(base)
    configs = {name: peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS[name]) for name in TARGETS}
    model = get_peft_model(base, configs["yes"], adapter_name="yes")
    model.add_adapter("no", configs["no"])
    print(ROW.format("in use", *(f"on {name!r}" for name in TARGETS)))
    for name in TARGETS:
        model.set_adapter(name)
        learn(model.train(), tasks[name], steps)
    with model.disable_adapter():
        show("none", model)
    for name in TARGETS:
        model.set_adapter(name)
        show(name, model)
    model.save_pretrained(output, selected_adapters=["no"])  # into the folder `no`
    again = load_peft_model(load_quantized(folder, QuantConfig(format="nf4", double_quant=True)), output / "no")
    show("no, loaded", again)
    show("no, merged", again.merge_and_unload())  # the adapted layers are no longer packed
    return seen


def broken_promises(seen: dict[str, dict[str, float]]) -> list[str]:
    """Returns the promises that do not hold."""
    promises = {
        "each adapter has a lower loss on its task than the base and the other adapter": all(
            seen[own][own] < min(seen["none"][own], seen[other][own]) for own, other in (("yes", "no"), ("no", "yes"))
        ),
        "a loaded adapter has its loss": abs(seen["no, loaded"]["no"] - seen["no"]["no"]) < 0.02,
        "a merged adapter keeps its loss": abs(seen["no, merged"]["no"] - seen["no"]["no"]) < 0.05,
    }
    return [promise for promise, holds in promises.items() if not holds]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a random model instead of the real one")
    parser.add_argument("--output", type=Path, default=Path("out/peft_api"), help="folder of the saved adapter")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_tiny_model(Path(scratch) / "model") if given.tiny else fetch_model()
        seen = run(folder, given.output, steps=15)
    print(json.dumps(seen))
    if broken := broken_promises(seen):
        raise SystemExit(f"error: these promises do not hold: {'; '.join(broken)}")


if __name__ == "__main__":
    main()
