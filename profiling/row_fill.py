"""How full are the rows that examples are packed into, and how long does packing take?

    python profiling/row_fill.py            # 100,000 lengths of each kind, five seconds
    python profiling/row_fill.py --tiny

Best-fit decreasing (`qlora_lite.data.packing`) is compared with first-fit in the order of a shuffled epoch, which tries
the newest 256 rows. The lengths are log-normal, as those of instructions with answers are, cut at the row's length; and
uniform. Fill is the tokens of examples, divided by the tokens that the rows hold. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from array import array
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from qlora_lite.data.packing import pack

COUNT, TINY_COUNT = 100_000, 2_000
OPEN_ROWS = 256
# Half of the examples have more than 148 tokens, a sixth more than 365. Of the logarithm: median and deviation.
MEDIAN, SPREAD = 5.0, 0.9


def first_fit(lengths: array[int], max_length: int) -> int:
    """Returns the number of rows if each example goes into the first of the newest rows that holds it."""
    space: list[int] = []
    for length in lengths:
        oldest = max(0, len(space) - OPEN_ROWS)
        row = next((row for row in range(oldest, len(space)) if space[row] >= length), len(space))
        if row == len(space):
            space.append(max_length)
        space[row] -= length
    return len(space)


def log_normal(generator: random.Random, max_length: int) -> int:
    return min(max_length, max(1, round(generator.lognormvariate(MEDIAN, SPREAD))))


def uniform(generator: random.Random, max_length: int) -> int:
    return generator.randint(1, max_length)


CASES: list[tuple[str, Callable[[random.Random, int], int], int]] = [
    ("log-normal", log_normal, 512),
    ("log-normal", log_normal, 2048),
    ("uniform", uniform, 512),
]


def measured(lengths: array[int], max_length: int) -> dict[str, float]:
    """Returns fill and seconds of both ways."""
    figures: dict[str, float] = {}
    for name, rows_for in (("first_fit", first_fit), ("best_fit", lambda *given: len(pack(*given)))):
        began = time.perf_counter()
        rows = rows_for(lengths, max_length)
        figures[f"{name}_seconds"] = time.perf_counter() - began
        figures[f"{name}_fill"] = sum(lengths) / (rows * max_length)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="few lengths")
    count = TINY_COUNT if parser.parse_args().tiny else COUNT
    summary = {}
    table = Table("lengths", "first-fit: fill", "s", "best-fit decreasing: fill", "s", title=f"{count:,} examples")
    for kind, draw, max_length in CASES:
        generator = random.Random(0)
        lengths = array("q", (draw(generator, max_length) for _ in range(count)))
        figures = summary[f"{kind} {max_length}"] = measured(lengths, max_length)
        cells = [
            f"{figures[f'{way}_fill']:.2%}" if what == "fill" else f"{figures[f'{way}_seconds']:.2f}"
            for way in ("first_fit", "best_fit")
            for what in ("fill", "seconds")
        ]
        table.add_row(f"{kind}, rows of {max_length}", *cells)
    Console().print(table)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
