"""Runs the workers of `step_worker.py` side by side, each in a process of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

WORKER = Path(__file__).with_name("step_worker.py")
WARM_UP_STEPS = 1


class WorkLike(Protocol):
    """The work of a worker: its script gets it as JSON, and is told to take so many steps."""

    @property
    def steps(self) -> int: ...

    def to_json(self) -> str: ...


AnyWork = TypeVar("AnyWork", bound=WorkLike)


class Worker:
    """A worker process and the figures that it has printed."""

    def __init__(self, work: WorkLike, script: Path = WORKER) -> None:
        self.work = work
        command = [sys.executable, str(script), work.to_json()]
        # Not a pipe: nobody reads while the worker runs, and warnings of a library may be more than a pipe holds.
        self._messages = tempfile.TemporaryFile("w+")  # noqa: SIM115 (the process writes to it)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._messages, text=True
        )
        self.figures: list[dict[str, Any]] = []
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self.figures.append(json.loads(line))
                return self.figures[-1]
        self.process.wait()
        self._messages.seek(0)
        raise SystemExit(f"the worker {self.work} ended:\n{self._messages.read().strip()[-2000:]}")

    def step(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self._answer()

    def finish(self) -> dict[str, Any]:
        """Ends the worker. Returns its median seconds, peaks and first loss."""
        self.step()  # the traced step
        last = self._answer()
        self.process.communicate()
        self._messages.close()
        steps = [figures for figures in self.figures if "seconds" in figures]
        return {
            "seconds": statistics.median(figures["seconds"] for figures in steps[WARM_UP_STEPS:]),
            "rss_peak": steps[-1]["peak"],
            "live_peak": self.figures[-2]["live_peak"],
            "live_resident": self.figures[-2]["live_resident"],
            "first_loss": last["first_loss"],
        }


def measure(works: Sequence[AnyWork], script: Path = WORKER) -> dict[AnyWork, dict[str, Any]]:
    """Runs the works side by side in workers of this script, a step of each in turn, and returns their figures."""
    workers = [Worker(work, script) for work in works]
    for _ in range(works[0].steps):
        for worker in workers:
            worker.step()
    return {work: worker.finish() for work, worker in zip(works, workers, strict=True)}
