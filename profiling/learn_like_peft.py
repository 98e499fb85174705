"""Does our training learn as well as transformers + peft + bitsandbytes, and what do the variants of LoRA change?

    python profiling/learn_like_peft.py                     # 100 steps of 1 x 192 tokens: about 20 minutes on two cores
    python profiling/learn_like_peft.py --variants          # the comparison alone
    python profiling/learn_like_peft.py --tiny              # random weights, in seconds: shows that the script works

Both sides train SmolLM2-135M-Instruct in NF4 with double quantization on Python's help texts: from the same A and B, on
the same batches in the same order, with the same schedule, clipping and AdamW, without dropout. Whole topics are held
out. Every training runs in a process of its own (parts/learning_worker.py).

`perplexity` is measured on held-out text by this library, on the packed base, for the adapters of both sides; `in peft`
is measured by the peer in a fresh process. Three comparisons show how far rounding alone moves the losses: this library
against itself in fp32 over the same packed base, against itself with A moved by half a step of bf16, and both sides in
fp32 for the first steps. The yardstick is the largest difference in a step between two runs of this library.

Prints tables, draws the losses (--plot), and ends with one JSON line: `ours_perplexity`, `peft_perplexity` and their
ratio, `largest_loss_difference`, `rounding_yardstick`, `differences` {pair: first, mean, largest}, `variants` {name:
before (perplexity before training), perplexity, step_seconds, peak}. Peaks are those of the process, above resident
memory before the first step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from parts.example_models import fetch_model
from parts.learning_worker import Work

WORKER = Path(__file__).resolve().parent / "parts" / "learning_worker.py"
MIB = 1 << 20
HELD_OUT, TINY_HELD_OUT = 32, 2  # rows of held-out text
SHORT_STEPS = 20  # of the peer's run in fp32
# The settings that differ from plain LoRA: rank 16, alpha 32, learning rate 2e-4, NF4.
VARIANTS: dict[str, dict[str, Any]] = {
    "use_rslora": {"settings": {"use_rslora": True}},
    "dora": {"settings": {"variant": "dora"}},
    "lora_plus": {"lora_plus_ratio": 4.0},
    "pissa": {"settings": {"init_lora_weights": "pissa"}},
    "loftq": {"settings": {"init_lora_weights": "loftq"}},
    "loftq_5": {"settings": {"init_lora_weights": "loftq:5"}},
    "int8": {"format": "int8"},
}
PAIRS = {
    "ours - peft": ("ours", "peft"),
    "ours - ours in fp32": ("ours", "ours_fp32"),
    "ours - ours, start moved": ("ours", "ours_moved"),
    "peft - ours in fp32": ("peft", "ours_fp32"),
    "both in fp32": ("ours_fp32", "peft_fp32"),
}
YARDSTICKS = ("ours - ours in fp32", "ours - ours, start moved")


def works(usual: Work, variants: list[str]) -> list[Work]:
    """Returns all works in order. usual: plain LoRA on our side."""
    short = min(SHORT_STEPS, usual.steps)
    peer = replace(usual, name="peft", kind="peer")
    return [
        replace(usual, name="base", kind="prepare"),
        usual,
        peer,
        replace(usual, name="ours_fp32", fp32=True),
        replace(usual, name="ours_moved", moved=True),
        replace(peer, name="peft_fp32", fp32=True, taken=short),
        replace(usual, name="judged_by_ours", kind="judge_ours", adapters=("peft",)),
        replace(usual, name="judged_by_peft", kind="judge_peer", adapters=("ours", "peft")),
        *(replace(usual, name=name, **VARIANTS[name]) for name in variants),
    ]


def run(group: list[Work]) -> Iterator[dict[str, Any]]:
    """Runs a group of works in one process, and yields their figures."""
    order = json.dumps([asdict(work) for work in group])
    command = [sys.executable, str(WORKER), order]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{', '.join(work.name for work in group)} ended:\n{done.stderr.strip()[-2000:]}")
    yield from (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))


def difference(one: list[float], other: list[float]) -> dict[str, float]:
    """Returns |one - other| of the first step, its mean and its maximum, over the steps that both have."""
    apart = [abs(a - b) for a, b in zip(one, other, strict=False)]
    return {"first": apart[0], "mean": statistics.mean(apart), "largest": max(apart)}


def verdict(found: dict[str, dict[str, Any]], variants: list[str]) -> dict[str, Any]:
    """Returns the figures of the JSON line."""
    differences = {
        pair: difference(found[one]["losses"], found[other]["losses"]) for pair, (one, other) in PAIRS.items()
    }
    rows = {"lora": found["ours"], **{name: found[name] for name in variants}}
    ours, theirs = found["ours"]["perplexity"], found["judged_by_ours"]["peft"]
    rows["peft"] = {**found["peft"], "before": found["base"]["perplexity"], "perplexity": theirs}
    return {
        "base_perplexity": found["base"]["perplexity"],
        "ours_perplexity": ours,
        "peft_perplexity": theirs,
        "perplexity_ratio": ours / theirs,
        "in_peft": {name: found["judged_by_peft"][name] for name in ("ours", "peft")},
        "largest_loss_difference": differences["ours - peft"]["largest"],
        "rounding_yardstick": max(differences[pair]["largest"] for pair in YARDSTICKS),
        "differences": differences,
        "variants": {
            name: {key: row[key] for key in ("before", "perplexity", "step_seconds", "peak")}
            for name, row in rows.items()
        },
    }


def tables(figures: dict[str, Any], steps: int) -> list[Table]:
    apart = Table("pair", "step 1", "mean", "largest", "steps", title="differences of losses")
    for pair, row in figures["differences"].items():
        count = min(SHORT_STEPS, steps) if pair == "both in fp32" else steps
        apart.add_row(pair, *(f"{row[key]:.1e}" for key in ("first", "mean", "largest")), str(count))
    learned = Table("adapter", "perplexity", "in peft", title="held out, plain LoRA")
    learned.add_row("none", f"{figures['base_perplexity']:.3f}", "-")
    for name in ("ours", "peft"):
        learned.add_row(name, f"{figures[f'{name}_perplexity']:.3f}", f"{figures['in_peft'][name]:.3f}")
    compared = Table("variant", "before", "perplexity", "s of a step", "peak MiB", title=f"at {steps} steps")
    for name, row in figures["variants"].items():
        sizes = f"{row['peak'] / MIB:,.0f}"
        learned_to = (f"{row[key]:.3f}" for key in ("before", "perplexity"))
        compared.add_row(name, *learned_to, f"{row['step_seconds']:.2f}", sizes)
    return [apart, learned, compared]


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws the losses of both sides over the steps, and below them the differences of all pairs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 7), sharex=True, height_ratios=(2, 1))
    for name, label, style in (("ours", "qlora_lite", "-"), ("peft", "transformers + peft + bitsandbytes", "--")):
        losses = found[name]["losses"]
        above.plot(range(1, len(losses) + 1), losses, style, label=label)
    for pair, (one, other) in PAIRS.items():
        apart = [abs(a - b) for a, b in zip(found[one]["losses"], found[other]["losses"], strict=False)]
        below.plot(range(1, len(apart) + 1), apart, label=pair, linewidth=2 if pair == "ours - peft" else 1)
    above.set_ylabel("loss")
    above.legend()
    below.set(xlabel="step", ylabel="|difference|", yscale="log")
    below.legend(fontsize="x-small", ncols=2)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=1, help="rows of a batch")
    parser.add_argument("--tokens", type=int, default=192, help="tokens of a row")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS), help="without a name, none")
    parser.add_argument("--plot", type=Path, default=Path("out/learn_like_peft.png"), help="file of the plot")
    parser.add_argument("--tiny", action="store_true", help="a random model of two small layers, in one process")
    return parser.parse_args()


def main() -> None:
    given, found = options(), dict[str, dict[str, Any]]()
    console = Console(width=max(100, Console().width))
    with tempfile.TemporaryDirectory() as scratch:
        if given.tiny:
            given.steps, given.tokens, model = 3, 32, Path(scratch) / "tiny"  # made by the worker
        else:
            model = fetch_model()
        held_out = TINY_HELD_OUT if given.tiny else HELD_OUT
        usual = Work("ours", "ours", str(model), scratch, given.steps, given.rows, given.tokens, held_out)
        ordered = works(usual, given.variants)
        for group in [ordered] if given.tiny else [[work] for work in ordered]:
            for figures in run(group):
                found[figures.pop("name")] = figures
                console.print(f"{len(found)} of {len(ordered)} done")
    figures = verdict(found, given.variants)
    for table in tables(figures, given.steps):
        console.print(table)
    draw(found, given.plot)
    print(f"plot: {given.plot}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
