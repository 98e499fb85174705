"""How do the time and memory of a step grow with its tokens and with the layers of the model?

    python profiling/step_growth.py                  # 256 to 2,048 tokens, 1 to 16 layers: some five minutes
    python profiling/step_growth.py --tiny

The model has the shape of SmolLM2-135M and random weights, in NF4, with every block recomputed. Each point is measured
in a process of its own (parts/step_worker.py): the median step, and the peak of live tensor bytes above the state after
set-up. Both should be linear, except for attention, whose time grows with the square of the tokens. Prints a table,
draws the lines (--plot), and ends with one JSON line: `tokens` and `layers`, each with its points and with
`seconds_deviation` and `peak_deviation`, the largest distance of a point from the least-squares line, as a share.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from parts.example_models import make_tiny_model
from parts.model_shapes import make_shape
from parts.step_processes import measure
from parts.step_worker import Work

MIB = 1 << 20
SHAPE = "smollm2-135m"
TOKENS, TINY_TOKENS = (256, 512, 1024, 2048), (16, 64)
LAYERS, TINY_LAYERS = (1, 2, 4, 8, 16), (1, 2)
STEPS = 4


def deviation(points: dict[int, float]) -> float:
    """Returns the largest distance of a point from the least-squares line, as a share of the point."""
    x, y = np.array(list(points)), np.array(list(points.values()))
    line = np.polyval(np.polyfit(x, y, 1), x)
    return float(np.max(np.abs(line - y) / y))


def grow(works: dict[int, Work], measured: dict[Work, Any]) -> dict[str, Any]:
    """Measures the works that are not `measured`. Returns points by size, and their deviations from straight lines."""
    for work in works.values():
        if work not in measured:
            measured |= measure([work])
    figures = {size: measured[work] for size, work in works.items()}
    result: dict[str, Any] = {"points": {}}
    for name, key in (("seconds", "seconds"), ("peak", "live_peak")):
        points = {size: float(row[key]) for size, row in figures.items()}
        result["points"][name] = points
        result[f"{name}_deviation"] = deviation(points)
    return result


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6))
    for column, (what, result) in enumerate(results.items()):
        for row, (name, scale, label) in enumerate((("seconds", 1, "seconds of a step"), ("peak", MIB, "peak (MiB)"))):
            points = result["points"][name]
            x, y = np.array(list(points)), np.array(list(points.values())) / scale
            axes[row][column].plot(x, y, "o")
            axes[row][column].plot(x, np.polyval(np.polyfit(x, y, 1), x), "-", alpha=0.6)
            axes[row][column].set(xlabel=what, ylabel=label, xlim=(0, None), ylim=(0, None))
            axes[row][column].grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--plot", type=Path, default=Path("out/step_growth.png"), help="file of the plot")
    parser.add_argument("--tiny", action="store_true", help="random models of one and two small layers")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if given.tiny:
            folders = {n: make_tiny_model(Path(scratch) / f"tiny{n}", layers=n) for n in TINY_LAYERS}
            lengths, length = TINY_TOKENS, TINY_TOKENS[0]
        else:
            folders = {n: make_shape(SHAPE, layers=n) for n in LAYERS}
            lengths, length = TOKENS, 512
        deepest = str(folders[max(folders)])

        def work(folder: str, tokens: int) -> Work:
            return Work("ours", folder, rows=1, tokens=tokens, steps=STEPS)

        measured: dict[Work, Any] = {}  # the deepest model on rows of the middle length is a point of both lines
        results = {
            "tokens": grow({n: work(deepest, n) for n in lengths}, measured),
            "layers": grow({n: work(str(folder), length) for n, folder in folders.items()}, measured),
        }
    table = Table("", "size", "seconds", "peak (MiB)")
    for what, result in results.items():
        for size, seconds in result["points"]["seconds"].items():
            table.add_row(what, str(size), f"{seconds:.3f}", f"{result['points']['peak'][size] / MIB:,.1f}")
    Console().print(table)
    draw(results, given.plot)
    print(f"plot: {given.plot}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
