"""How do our training steps compare with those of transformers + peft + bitsandbytes, in time and in memory?

    python profiling/versus_peft.py                      # every case: about 15 minutes on two cores
    python profiling/versus_peft.py nf4_full floor       # some cases
    python profiling/versus_peft.py --tiny               # random weights, in seconds: shows that the script works

Each side of a case runs in a process of its own (parts/step_worker.py). The processes take steps in turn, one at a
time, and the median step counts. Peaks are above the state after set-up: of the process (`peak`, VmHWM) and of live
tensor bytes (`live`). The optimizer is made after set-up, so both include it. The case `resident` compares the bytes of
the tensors after set-up instead. Prints a table, draws time against memory (--plot), and ends with one JSON line: case
-> `time_ratio`, `peak_ratio`, `live_ratio`, and the figures behind them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from parts.example_models import fetch_model, make_tiny_model
from parts.model_shapes import make_shape
from parts.step_processes import WARM_UP_STEPS, measure
from parts.step_worker import Work

MIB = 1 << 20
HALF_OF_PEER = "half of the peer's peak"


@dataclass(frozen=True)
class Case:
    """A comparison of two works, and the aims for their ratios (None: no aim)."""

    ours: Work
    against: Work
    time: float | None
    peak: float | None
    of: str = "rss_peak"


def cases(small: str, large: str, rows: int = 2, tokens: int = 512) -> dict[str, Case]:
    """Returns every case by name. small, large: folders of the real model and of the 1.1B shape."""
    ours = Work("ours", small, rows=rows, tokens=tokens)
    peer = replace(ours, side="peer")
    free = replace(ours, checkpointing="none")
    half = replace(ours, checkpointing=HALF_OF_PEER)
    eight = replace(ours, format="int8")
    big = replace(ours, model=large, rows=1)
    big_peer = replace(big, side="peer")
    return {
        "nf4_full": Case(ours, peer, 0.60, 0.15),
        "nf4_half_budget": Case(half, peer, 0.58, 0.50),
        "nf4_none": Case(free, peer, 0.43, 0.75),
        "nf4_none_vs_none": Case(free, replace(peer, checkpointing="none"), 0.55, 0.25),
        "int8_full": Case(eight, replace(peer, format="int8"), 0.50, 0.12),
        "int8_products": Case(replace(eight, int8_activations=True), replace(peer, format="int8"), None, None),
        "1b_full": Case(big, big_peer, 0.76, 0.30),
        "1b_none": Case(replace(big, checkpointing="none"), big_peer, 0.53, 1.00),
        "resident": Case(replace(ours, embedding_format="int8"), peer, None, 0.60, of="live_resident"),
        "dropout": Case(replace(ours, dropout=0.1), ours, 1.03, 1.00),
        "floor": Case(ours, replace(ours, side="floor"), 1.20, None),
    }


def resolve_budgets(chosen: dict[str, Case]) -> dict[str, Case]:
    """Replaces HALF_OF_PEER by a number of bytes, measured in a step of the peer."""
    resolved = dict(chosen)
    for name, case in chosen.items():
        if case.ours.checkpointing == HALF_OF_PEER:
            short = replace(case.against, steps=WARM_UP_STEPS + 1)
            budget = measure([short])[short]["live_peak"] // 2  # a budget counts live bytes
            resolved[name] = replace(case, ours=replace(case.ours, checkpointing=budget))
    return resolved


def run(chosen: dict[str, Case]) -> dict[str, dict[str, Any]]:
    """Returns the figures of each case. Works of one model and one format take their steps in turn."""
    groups: dict[tuple[str, str], list[Work]] = {}
    for case in chosen.values():
        for work in (case.ours, case.against):
            group = groups.setdefault((work.model, work.format), [])
            if work not in group:
                group.append(work)
    measured: dict[Work, dict[str, Any]] = {}
    for group in groups.values():
        measured |= measure(group)
    return {name: compare(case, measured[case.ours], measured[case.against]) for name, case in chosen.items()}


def compare(case: Case, ours: dict[str, Any], against: dict[str, Any]) -> dict[str, Any]:
    """Returns the ratios of one case. Ends the script if the first losses differ by more than 1 %."""
    ratios: dict[str, Any] = {
        "time_ratio": ours["seconds"] / against["seconds"],
        "peak_ratio": None,
        "live_ratio": None,
    }
    if against["first_loss"] is not None:  # the floor holds no memory of a step
        ratios["peak_ratio"] = ours[case.of] / against[case.of]
        ratios["live_ratio"] = ours["live_peak"] / against["live_peak"] if case.of == "rss_peak" else None
    losses = ours["first_loss"], against["first_loss"]
    if None not in losses and abs(losses[0] - losses[1]) > 0.01 * abs(losses[1]):
        raise SystemExit(f"the first losses of {case.ours} and its peer differ: {losses[0]:.4f} and {losses[1]:.4f}")
    return {**ratios, "ours": ours, "against": against}


def table(chosen: dict[str, Case], results: dict[str, dict[str, Any]]) -> Table:
    columns = ("case", "s", "against", "time", "aim", "MiB", "against", "peak", "aim", "live")
    drawn = Table(
        *columns, title="ours against transformers + peft + bitsandbytes (floor: matrix products and attention)"
    )
    for column in drawn.columns:
        column.no_wrap = True

    def ratio(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    for name, result in results.items():
        case, ours, against = chosen[name], result["ours"], result["against"]
        times = (f"{ours['seconds']:.2f}", f"{against['seconds']:.2f}", ratio(result["time_ratio"]), ratio(case.time))
        sizes = (f"{figures[case.of] / MIB:,.0f}" for figures in (ours, against))
        drawn.add_row(name, *times, *sizes, ratio(result["peak_ratio"]), ratio(case.peak), ratio(result["live_ratio"]))
    return drawn


def draw_frontier(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws seconds of a step against its peak, with a point for each work of the real model in NF4."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for side, marker in (("ours", "o"), ("against", "s")):
        named = {n: r[side] for n, r in results.items() if n.startswith("nf4") and r[side]["live_peak"] is not None}
        points = sorted({(f["live_peak"] / MIB, f["seconds"]) for f in named.values()})
        label = "qlora_lite" if side == "ours" else "transformers + peft + bitsandbytes"
        axes.plot(*zip(*points, strict=True), marker=marker, label=label) if points else None
    axes.set_xlabel("peak above resident, live tensor bytes (MiB)")
    axes.set_ylabel("seconds of a step")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="names of cases; all without a name")
    parser.add_argument("--plot", type=Path, default=Path("out/versus_peft.png"), help="file of the plot")
    parser.add_argument("--tiny", action="store_true", help="a random model of two small layers, 2 x 32 tokens")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if given.tiny:
            small = str(make_tiny_model(Path(scratch) / "tiny"))
            every = cases(small, small, tokens=32)
        else:
            needs_large = not given.cases or any(name.startswith("1b") for name in given.cases)
            every = cases(str(fetch_model()), str(make_shape("llama-1b")) if needs_large else "")
        unknown = [name for name in given.cases if name not in every]
        if unknown:
            parser.error(f"unknown cases: {', '.join(unknown)}; the cases are {', '.join(every)}")
        chosen = resolve_budgets({name: case for name, case in every.items() if not given.cases or name in given.cases})
        results = run(chosen)
    Console(width=max(100, Console().width)).print(table(chosen, results))
    draw_frontier(results, given.plot)
    print(f"plot: {given.plot}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
