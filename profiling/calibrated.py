"""How much of what rounding to NF4 costs does calibration take back, on which text, and how long does it take?

    python profiling/calibrated.py --chats folder             # SmolLM2-135M-Instruct, on each kind and on a mixture
    python profiling/calibrated.py --on mixture               # on the mixture alone; chats are left out
    python profiling/calibrated.py --tiny

The kinds of text are Python's help texts, docstrings of the standard library, and the exchanges of chatterbot-corpus
(`--chats`: its folder chatterbot_corpus/data/english). Half of the records of each kind are calibrated on, the other
half is held out; both halves are joined to rows of 512 tokens. The mixture has as many tokens as one kind. The share of
a cell is (model - 16-bit) / (rounded - 16-bit): of perplexity, and of KL(16-bit || model).

Prints a table and one JSON line. `loss_share`, `kl_share`, `worst_cell`: over the kinds that were not calibrated on,
None unless each kind was. `mixed`, `mixed_kl`: means over the kinds for the mixture. `bytes_ratio`: the files beside
those of rounding. `seconds`, `cpu_seconds`: of a calibration, the mean. `cells`: all shares.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from parts.chats import Chats
from parts.example_models import model_folder
from parts.kinds_of_text import Record, chats, docstrings, halves, help_texts
from qlora_lite import QuantConfig, load_quantized
from qlora_lite.architecture import hidden_states
from qlora_lite.calibration import calibrate
from qlora_lite.calibration.held_out import Comparison
from qlora_lite.checkpoints.hub import load_tokenizer
from qlora_lite.data.batching import epoch_order
from qlora_lite.data.tokenization import tokenize_all
from qlora_lite.export import save_quantized

MIXTURE, PLAIN, ROUNDED = "mixture", "16-bit", "rounded"
CHOICES = ("help texts", "docstrings", "chats", MIXTURE)
WINDOW, HELD_OUT_ROWS, ROWS_AT_ONCE, DOCSTRINGS = 512, 8, 4, 1500
TINY_WINDOW, TINY_ROWS, TINY_TOKENS = 64, 2, 512


def kinds_of_text(folder: Path | None, tiny: bool) -> dict[str, list[Record]]:
    """Returns the records of each kind. A tiny run has few, and chats made of the words of the help texts."""
    found = {"help texts": help_texts(), "docstrings": docstrings(20 if tiny else DOCSTRINGS)}
    if tiny:
        made = Chats()
        return {
            "help texts": found["help texts"][:20],
            **found,
            "chats": [{"messages": made.chat(1)} for _ in range(40)],
        }
    return found if folder is None else found | {"chats": chats(folder)}


def rows_of(records: list[Record], tokenizer: Any, rows: int, window: int) -> torch.Tensor:
    """Returns `(rows, window)` tokens of shuffled records, joined."""
    examples = tokenize_all(records, tokenizer, learn="all", prompts_too=True).examples
    ids = [token for index in epoch_order(len(examples), 0, 0) for token in examples[index].input_ids]
    if len(ids) < rows * window:
        raise SystemExit(f"error: a kind of text has {len(ids)} tokens, {rows * window} are needed; ask for fewer")
    return torch.tensor(ids[: rows * window]).view(rows, window)


def in_batches(rows: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": part} for part in rows.split(ROWS_AT_ONCE)]


@torch.no_grad()
def compared(plain: Any, models: dict[str, Any], rows: torch.Tensor) -> Comparison:
    """Returns perplexities and divergences of models on some rows."""
    found = Comparison()
    for batch in in_batches(rows):
        states = {name: hidden_states(model, batch) for name, model in {PLAIN: plain, **models}.items()}
        found.add(plain, batch, PLAIN, states)
    return found


def shares(plain: Any, rounded: Any, model: Any, held_out: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Returns the share of perplexity and of KL, and both perplexities, of a calibrated model on each kind."""
    found = {}
    for kind, rows in held_out.items():
        by = compared(plain, {ROUNDED: rounded, "calibrated": model}, rows)
        first, second, third = (by.perplexity(name) for name in (PLAIN, ROUNDED, "calibrated"))
        found[kind] = {
            "share": (third - first) / (second - first),
            "kl_share": by.mean_kl("calibrated") / by.mean_kl(ROUNDED),
            "perplexity": third,
            "perplexity_16_bit": first,
            "perplexity_rounded": second,
        }
    return found


def summary(cells: dict[str, dict[str, dict[str, float]]]) -> dict[str, float | None]:
    """Returns the figures over all cells."""
    others = [cell for on, row in cells.items() for kind, cell in row.items() if on not in (kind, MIXTURE)]
    mixed = list(cells.get(MIXTURE, {}).values())

    def mean(some: list[dict[str, float]], name: str) -> float | None:
        return statistics.mean(cell[name] for cell in some) if some else None

    return {
        "loss_share": mean(others, "share"),
        "kl_share": mean(others, "kl_share"),
        "worst_cell": max((cell["share"] for cell in others), default=None),
        "mixed": mean(mixed, "share"),
        "mixed_kl": mean(mixed, "kl_share"),
    }


def drawn(cells: dict[str, dict[str, dict[str, float]]], kinds: list[str]) -> Table:
    table = Table("calibrated on", *kinds, title="share of what rounding costs: perplexity, KL")
    for on, row in cells.items():
        table.add_row(on, *(f"{row[kind]['share']:.3f}, {row[kind]['kl_share']:.3f}" for kind in kinds))
    return table


def tensor_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measure(folder: Path, given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    window, rows = (TINY_WINDOW, TINY_ROWS) if given.tiny else (WINDOW, HELD_OUT_ROWS)
    tokenizer, count = load_tokenizer(folder), given.tokens // window
    records = {kind: halves(found) for kind, found in kinds_of_text(given.chats, given.tiny).items()}
    text = {kind: first for kind, (first, _) in records.items()}
    held_out = {kind: rows_of(second, tokenizer, rows, window) for kind, (_, second) in records.items()}
    plain, rounded = load_quantized(folder, QuantConfig(format="none")), load_quantized(folder)
    save_quantized(rounded, scratch / ROUNDED)
    cells, seconds, cpu_seconds = dict[str, dict[str, dict[str, float]]](), list[float](), list[float]()
    for on in given.on or [*text, MIXTURE]:
        parts = (
            [rows_of(some, tokenizer, -(-count // len(text)), window) for some in text.values()]
            if on == MIXTURE
            else []
        )
        tokens = torch.cat(parts)[:count] if parts else rows_of(text[on], tokenizer, count, window)
        began, cpu_began = time.perf_counter(), time.process_time()
        calibrate(folder, scratch / "calibrated", in_batches(tokens), overwrite=True)
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(time.process_time() - cpu_began)
        cells[on] = shares(plain, rounded, load_quantized(scratch / "calibrated"), held_out)
    Console(width=max(100, Console().width)).print(drawn(cells, list(held_out)))
    ratio = tensor_bytes(scratch / "calibrated") / tensor_bytes(scratch / ROUNDED)
    times = {"seconds": statistics.mean(seconds), "cpu_seconds": statistics.mean(cpu_seconds)}
    return {"tokens": count * window, **summary(cells), "bytes_ratio": ratio, **times, "cells": cells}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of a checkpoint; without it SmolLM2-135M-Instruct")
    parser.add_argument("--chats", type=Path, help="folder of chatterbot-corpus with its .yml files")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens to calibrate on")
    parser.add_argument(
        "--on", nargs="+", choices=CHOICES, help="kinds of text to calibrate on, or mixture; all without it"
    )
    parser.add_argument("--tiny", action="store_true", help="a random model of two small layers")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if given.tiny:
            given.tokens, given.on = TINY_TOKENS, ["docstrings", MIXTURE]
        folder = given.model if given.model is not None and not given.tiny else model_folder(given.tiny, Path(scratch))
        print(json.dumps(measure(folder, given, Path(scratch))))


if __name__ == "__main__":
    main()
