"""How many tokens a second does a packed model generate on a CPU, and in how much memory?

    python profiling/generation.py                  # every case: about ten minutes on two cores
    python profiling/generation.py nf4 --rows 1 8   # some cases, some batch sizes
    python profiling/generation.py --check          # whether the tokens are those of the dequantized weights
    python profiling/generation.py --tiny --check   # random weights, in seconds: shows that the script works

Each side of a case generates greedily in a process of its own (parts/generation_worker.py), after a prompt of 128
tokens, 1, 8 and 32 rows at once: ours with `decode_copies`, the peer with transformers + bitsandbytes (+ peft), or with
plain bf16 weights. The processes take turns, one at a time, and the median turn counts. Tokens a second are those after
the first token. Memory is the most live tensor bytes above those of the model, and beside it the bytes of the copies.

`--check` generates 64 tokens after each of ten prompts (parts/greedy_tokens.py). Prints a table and ends with one JSON
line: `<case>_batch<rows>` -> ratio in tokens a second, `memory_ratio` (live bytes), `resident_ratio` and the figures
behind them, `<case>_memory` -> bytes and ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from parts.example_models import model_folder
from parts.generation_worker import GenerationWork
from parts.greedy_tokens import check_greedy_tokens
from parts.machine_floor import cpu_name
from parts.step_processes import Worker

MIB = 1 << 20
WORKER = Path(__file__).parent / "parts" / "generation_worker.py"
CHECKED_FORMATS = ("nf4", "int8")


@dataclass(frozen=True)
class Case:
    """A comparison of two works, and the aims for their ratios in tokens a second: rows -> at least."""

    ours: GenerationWork
    peer: GenerationWork
    aims: dict[int, float]


def cases(model: str, rows: list[int], tiny: bool) -> dict[str, Case]:
    """Returns every case by name. model: folder of the checkpoint. rows: the batch sizes."""
    nf4 = GenerationWork("ours", model, batches=tuple(rows))
    if tiny:
        nf4 = replace(nf4, batches=(1,), prompt=16, new_tokens=4, turns=2)
    lora, int8 = replace(nf4, lora=True), replace(nf4, format="int8")

    def peer(work: GenerationWork, side: str = "peer") -> GenerationWork:
        return replace(work, side=side)

    return {
        "nf4": Case(nf4, peer(nf4), {1: 1.3, 8: 1.3}),
        "nf4_lora": Case(lora, peer(lora), {1: 1.3}),
        "int8": Case(int8, peer(int8), {1: 1.0}),
        "bf16": Case(nf4, peer(nf4, "plain"), {1: 1.0}),
    }


def measure(works: list[GenerationWork]) -> dict[GenerationWork, dict[str, Any]]:
    """Runs the works side by side, a batch of each in turn, and returns their figures by batch size."""
    workers = [Worker(work, WORKER) for work in works]
    for _ in range(works[0].steps + len(works[0].batches)):
        for worker in workers:
            worker.step()
    for worker in workers:
        worker.process.communicate()
    return {worker.work: figures_of(worker) for worker in workers if isinstance(worker.work, GenerationWork)}


def figures_of(worker: Worker) -> dict[str, Any]:
    """Returns {batch size: median figures} of a worker, and the bytes of its copies."""
    work, (ready, *lines) = worker.work, worker.figures
    assert isinstance(work, GenerationWork)
    made: dict[str, Any] = {"copied": ready["copied"]}
    for batch in work.batches:
        turns = [line for line in lines if line["batch"] == batch]
        timed = [line for line in turns if "seconds" in line][1:]  # the first one warms up
        seconds = statistics.median(line["seconds"] for line in timed)
        made[str(batch)] = {
            "tokens_per_second": batch * (work.new_tokens - 1) / seconds,
            "prompt_seconds": statistics.median(line["prompt_seconds"] for line in timed),
            "rss_peak": statistics.median(line["peak"] for line in timed),
            "live_peak": turns[-1]["live_peak"],
        }
    return made


def compare(name: str, ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of one case: a ratio for each batch size, and one of the memory of the largest batch."""
    batches = [batch for batch in ours if batch != "copied"]
    made: dict[str, Any] = {}
    for batch in batches:
        sides = {"ours": ours[batch], "peer": peer[batch]}
        speeds = [side["tokens_per_second"] for side in sides.values()]
        made[f"{name}_batch{batch}"] = {
            "ratio": speeds[0] / speeds[1],
            "memory_ratio": ours[batch]["live_peak"] / peer[batch]["live_peak"],
            "resident_ratio": ours[batch]["rss_peak"] / peer[batch]["rss_peak"],
            **sides,
        }
    peaks = [max(side[batch]["live_peak"] for batch in batches) for side in (ours, peer)]
    made[f"{name}_memory"] = {
        "ratio": peaks[0] / peaks[1],
        "ours": peaks[0],
        "peer": peaks[1],
        "copied": ours["copied"],
    }
    return made


def table(chosen: dict[str, Case], results: dict[str, Any]) -> Table:
    columns = ("case", "rows", "tokens/s", "peer", "ratio", "aim", "prompt s", "peer", "MiB", "peer", "RSS", "peer")
    drawn = Table(*columns, title="greedy tokens after a prompt, against transformers + bitsandbytes (+ peft)")
    for name, case in chosen.items():
        for batch in case.ours.batches:
            figures = results[f"{name}_batch{batch}"]
            sides = figures["ours"], figures["peer"]
            speeds = (f"{side['tokens_per_second']:.1f}" for side in sides)
            aim = f"{case.aims[batch]:.1f}" if batch in case.aims else "-"
            prompts = (f"{side['prompt_seconds']:.2f}" for side in sides)
            sizes = (f"{side[key] / MIB:,.0f}" for key in ("live_peak", "rss_peak") for side in sides)
            drawn.add_row(name, str(batch), *speeds, f"{figures['ratio']:.2f}", aim, *prompts, *sizes)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="names of cases; all without a name")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32], help="rows of a batch; default: 1 8 32")
    parser.add_argument("--tiny", action="store_true", help="a random model of two small layers, few tokens of one row")
    parser.add_argument("--check", action="store_true", help="compare tokens instead of measuring; also with cases")
    given = parser.parse_args()
    results: dict[str, Any] = {"cpu": cpu_name()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(given.tiny, Path(scratch))
        every = cases(str(folder), given.rows, given.tiny)
        if unknown := [name for name in given.cases if name not in every]:
            parser.error(f"unknown cases: {', '.join(unknown)}; the cases are {', '.join(every)}")
        if given.check:
            results["check"] = {format: check_greedy_tokens(folder, format, given.tiny) for format in CHECKED_FORMATS}
        named = given.cases or ([] if given.check else list(every))
        chosen = {name: every[name] for name in named}
        measured: dict[GenerationWork, dict[str, Any]] = {}
        for case in chosen.values():
            missing = [work for work in (case.ours, case.peer) if work not in measured]
            measured |= measure(missing) if missing else {}
    for name, case in chosen.items():
        results |= compare(name, measured[case.ours], measured[case.peer])
    console = Console(width=max(110, Console().width))
    if chosen:
        console.print(table(chosen, results))
    for format, found in results.get("check", {}).items():
        console.print(f"{format}: {found['equal']} of {found['prompts']} answers equal, {found['tied']} part at a tie")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
