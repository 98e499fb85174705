"""What do three changed lines save in an existing script of trl or transformers' Trainer, in time and in memory?

    python profiling/versus_trl.py                   # every case: about half an hour on two cores
    python profiling/versus_trl.py sft_full dpo      # some cases
    python profiling/versus_trl.py --tiny            # random weights, in a minute: shows that the script works

Each side of a case is the same script in a process of its own (parts/trl_worker.py): the peer with transformers, peft
and bitsandbytes, ours with `load_quantized` and the trainers of `qlora_lite.integrations.trl`. The processes take steps
in turn, one at a time, and the median step counts. Peaks are live tensor bytes above the state after set-up;
`dpo_resident` compares the bytes of the tensors after set-up with our base on disk, `dpo_resident_memory` with it in
memory, as the peer's is, and `dpo_resident_int8` in memory with an embedding of int8 rows, which bitsandbytes does not
have. Prints a table and ends with one JSON line: case -> `time_ratio`, `peak_ratio`, and the figures behind them.
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

from parts.example_models import model_folder
from parts.machine_floor import cpu_name
from parts.step_processes import measure
from parts.trl_worker import TrainerWork

MIB = 1 << 20
WORKER = Path(__file__).parent / "parts" / "trl_worker.py"
# How far first losses may differ. trl's default of the DPO loss begins at ln 2 on both sides.
LOSS_TOLERANCE = 0.01


@dataclass(frozen=True)
class Case:
    """A comparison of two works, and the aims for their ratios (None: no aim). of: the figure that `peak` compares."""

    ours: TrainerWork
    peer: TrainerWork
    time: float | None
    peak: float
    of: str = "live_peak"


def cases(model: str, scale: int) -> dict[str, Case]:
    """Returns every case by name. model: folder of the checkpoint. scale: divides the number of tokens."""
    sft = TrainerWork("ours", "sft", model, tokens=512 // scale)
    dpo = replace(sft, trainer="dpo", tokens=256 // scale)
    grpo = replace(sft, trainer="grpo", rows=4, tokens=128 // scale)
    trainer = replace(sft, trainer="trainer")

    def peer(work: TrainerWork) -> TrainerWork:
        return replace(work, side="peer")

    return {
        "sft_full": Case(sft, peer(sft), 0.75, 0.20),
        "sft_none": Case(replace(sft, checkpointing=False), peer(sft), 0.55, 0.75),
        "dpo": Case(dpo, peer(dpo), 0.70, 0.25),
        "dpo_resident": Case(replace(dpo, base="disk"), peer(dpo), None, 0.60, of="live_resident"),
        "dpo_resident_memory": Case(dpo, peer(dpo), None, 0.60, of="live_resident"),
        "dpo_resident_int8": Case(replace(dpo, embedding_format="int8"), peer(dpo), None, 0.60, of="live_resident"),
        "grpo": Case(grpo, peer(grpo), 0.80, 0.40),
        "trainer": Case(trainer, peer(trainer), 0.75, 0.20),
    }


def compare(case: Case, ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """Returns the ratios of one case. Ends the script if the first losses differ."""
    losses = ours["first_loss"], peer["first_loss"]
    if case.ours.trainer != "grpo" and abs(losses[0] - losses[1]) > LOSS_TOLERANCE * abs(losses[1]):
        raise SystemExit(f"the first losses of {case.ours} and its peer differ: {losses[0]:.4f} and {losses[1]:.4f}")
    return {
        "time_ratio": ours["seconds"] / peer["seconds"],
        "peak_ratio": ours[case.of] / peer[case.of],
        "ours": ours,
        "peer": peer,
    }


def table(chosen: dict[str, Case], results: dict[str, dict[str, Any]]) -> Table:
    columns = ("case", "s", "peer", "time", "aim", "MiB", "peer", "peak", "aim")
    drawn = Table(*columns, title="three lines changed, against trl + transformers + peft + bitsandbytes")
    for name, result in results.items():
        case, ours, peer = chosen[name], result["ours"], result["peer"]
        aim = "-" if case.time is None else f"{case.time:.2f}"
        seconds = (f"{ours['seconds']:.2f}", f"{peer['seconds']:.2f}", f"{result['time_ratio']:.2f}", aim)
        sizes = (f"{figures[case.of] / MIB:,.0f}" for figures in (ours, peer))
        drawn.add_row(name, *seconds, *sizes, f"{result['peak_ratio']:.2f}", f"{case.peak:.2f}")
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="names of cases; all without a name")
    parser.add_argument("--tiny", action="store_true", help="a random model of two small layers, short rows")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        every = cases(str(model_folder(given.tiny, Path(scratch))), 8 if given.tiny else 1)
        if unknown := [name for name in given.cases if name not in every]:
            parser.error(f"unknown cases: {', '.join(unknown)}; the cases are {', '.join(every)}")
        chosen = {name: case for name, case in every.items() if not given.cases or name in given.cases}
        measured: dict[TrainerWork, dict[str, Any]] = {}
        for case in chosen.values():
            missing = [work for work in (case.ours, case.peer) if work not in measured]
            measured |= measure(missing, WORKER) if missing else {}
    results = {name: compare(case, measured[case.ours], measured[case.peer]) for name, case in chosen.items()}
    Console(width=max(100, Console().width)).print(table(chosen, results))
    print(json.dumps({"cpu": cpu_name(), **results}))


if __name__ == "__main__":
    main()
