"""How much time do the threads of a training step wait, for each other and for the system, and which settings help?

    python profiling/waiting.py                  # SmolLM2-135M, 2 x 512 tokens: about ten minutes on two quiet cores
    python profiling/waiting.py passive hugetlb  # these settings, beside the default and one thread
    python profiling/waiting.py --tiny           # a small random model: shows that the script works

A setting is a set of environment variables of OpenMP or malloc, which are read when a process starts. Each has a worker
(parts/step_worker.py), and the workers take steps in turn. Linux counts for each step, over all threads: seconds on a
core, seconds in which a thread wanted a core and another program had it (`queued`), page faults, and switches between
threads (voluntary: the thread waited; involuntary: another one got the core).

Of the thread time of a step, threads x wall seconds, `waiting_share` is what one thread alone would not need for the
same step: 1 - (core seconds of a step with one thread) / (threads x wall). Its parts are `spinning_share`, core seconds
beyond those of one thread (OpenMP's threads wait in a loop before they sleep, and share caches), `queued_share`, and
sleep. A share below zero means that one thread needed more core seconds than two.

Prints a table of medians and one JSON line: `cpu`, `threads`, `checkpointing`, and `settings`, the figures of each.
`queued_share` and involuntary switches say whether other programs were in the way; on a busy machine, the shares are
those of that machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.table import Table

from parts.example_models import model_folder
from parts.machine_floor import cpu_name
from parts.step_processes import WARM_UP_STEPS, Worker
from parts.step_worker import Work

DEFAULT, ONE_THREAD = "default", "one thread"
# No `OMP_WAIT_POLICY=active`: its threads spin while the workers of other settings take their steps.
SETTINGS: dict[str, dict[str, str]] = {
    DEFAULT: {},
    ONE_THREAD: {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "short spin": {"GOMP_SPINCOUNT": "10000"},
    "long spin": {"GOMP_SPINCOUNT": "3000000"},
    "bound": {"OMP_PROC_BIND": "true"},
    "one arena": {"MALLOC_ARENA_MAX": "1"},
    "hugetlb": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
}
ALWAYS = (DEFAULT, ONE_THREAD)
VARIABLES = {name for settings in SETTINGS.values() for name in settings}
FAULTS_FIELD, SYSTEM_FIELD = 7, 12  # of /proc/<process>/stat, counted behind the name (proc(5))
SWITCHES = {"voluntary_switches": "voluntary_ctxt_switches", "involuntary_switches": "nonvoluntary_ctxt_switches"}


@dataclass(frozen=True)
class Counts:
    """What Linux has counted of a process since it began, and the clock; seconds and numbers."""

    wall: float
    on_core: float
    system: float
    queued: float
    page_faults: int
    voluntary_switches: int
    involuntary_switches: int

    @classmethod
    def of(cls, process: int) -> Counts:
        folder = Path("/proc") / str(process)
        fields = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        switches, on_core, queued = dict.fromkeys(SWITCHES, 0), 0.0, 0.0
        for thread in (folder / "task").iterdir():
            lines = (line.partition(":") for line in (thread / "status").read_text(encoding="utf-8").splitlines())
            told = {name: value.strip() for name, _, value in lines}
            for name, theirs in SWITCHES.items():
                switches[name] += int(told[theirs])
            on_core_ns, queued_ns, _ = (thread / "schedstat").read_text(encoding="utf-8").split()
            on_core, queued = on_core + int(on_core_ns) / 1e9, queued + int(queued_ns) / 1e9
        system = int(fields[SYSTEM_FIELD]) / os.sysconf("SC_CLK_TCK")
        return cls(perf_counter(), on_core, system, queued, int(fields[FAULTS_FIELD]), **switches)

    def since(self, before: Counts) -> dict[str, float]:
        return {name: value - getattr(before, name) for name, value in vars(self).items()}


def started(work: Work, settings: dict[str, str]) -> Worker:
    """Starts a worker with these variables, and with none of the other settings'."""
    before = {name: os.environ.pop(name, None) for name in VARIABLES}
    os.environ.update(settings)
    try:
        return Worker(work)
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def measured(work: Work, names: list[str]) -> dict[str, dict[str, float]]:
    """Returns the median figures of a step for each setting, and the peak of the process in MiB."""
    works = {name: replace(work, threads=1) if name == ONE_THREAD else work for name in names}
    workers = {name: started(works[name], SETTINGS[name]) for name in names}
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(work.steps):
        for name, worker in workers.items():
            before = Counts.of(worker.process.pid)
            worker.step()
            steps[name].append(Counts.of(worker.process.pid).since(before))
    figures = {}
    for name, own in steps.items():
        medians = {key: statistics.median(step[key] for step in own[WARM_UP_STEPS:]) for key in own[0]}
        figures[name] = {**medians, "peak_mib": workers[name].finish()["rss_peak"] / (1 << 20)}
    return with_shares(figures, {name: one.threads for name, one in works.items()})


def with_shares(figures: dict[str, dict[str, float]], threads: dict[str, int]) -> dict[str, dict[str, float]]:
    """Returns the figures of each setting with the shares of its thread time."""
    needed, found = figures[ONE_THREAD]["on_core"], {}
    for name, own in figures.items():
        thread_time = threads[name] * own["wall"]
        shares = {"waiting": thread_time - needed, "spinning": own["on_core"] - needed, "queued": own["queued"]}
        found[name] = {**own, **{f"{share}_share": seconds / thread_time for share, seconds in shares.items()}}
    return found


def table(figures: dict[str, dict[str, float]]) -> Table:
    seconds, shares = ("wall", "on_core", "system"), ("waiting_share", "spinning_share", "queued_share")
    counts = ("page_faults", *SWITCHES, "peak_mib")
    drawn = Table("setting", *(key.replace("_", " ") for key in (*seconds, *shares, *counts)), title=cpu_name())
    for name, own in figures.items():
        decimals = (f"{own[key]:.2f}" for key in (*seconds, *shares))
        drawn.add_row(name, *decimals, *(f"{own[key]:,.0f}" for key in counts))
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=f"of {', '.join(SETTINGS)}; all without one")
    parser.add_argument("--checkpointing", default="full", choices=("full", "none"))
    parser.add_argument("--steps", type=int, default=6, help="steps of each setting, the first one as warm-up")
    parser.add_argument("--tiny", action="store_true", help="a random model of two small layers, 2 x 32 tokens")
    given = parser.parse_args()
    if unknown := [name for name in given.settings if name not in SETTINGS]:
        parser.error(f"there are no settings {', '.join(unknown)}; the settings are {', '.join(SETTINGS)}")
    if given.steps <= WARM_UP_STEPS:
        parser.error(f"--steps must be at least {WARM_UP_STEPS + 1}, since the first is a warm-up; got {given.steps}")
    if not Path("/proc/self/schedstat").exists():
        parser.error("this script reads /proc/<process>/schedstat, which this system does not have; run it on Linux")
    names = [name for name in SETTINGS if name in ALWAYS or not given.settings or name in given.settings]
    with tempfile.TemporaryDirectory() as scratch:
        model, tokens = model_folder(given.tiny, Path(scratch)), 32 if given.tiny else 512
        work = Work("ours", str(model), checkpointing=given.checkpointing, tokens=tokens, steps=given.steps)
        figures = measured(work, names)
    Console(width=max(140, Console().width)).print(table(figures))
    print(
        json.dumps(
            {"cpu": cpu_name(), "threads": work.threads, "checkpointing": given.checkpointing} | {"settings": figures}
        )
    )


if __name__ == "__main__":
    main()
