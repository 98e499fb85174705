"""What is told of a run while it goes on: events.jsonl in its folder, and observers such as trackers.

events.jsonl has a line for each time that the run began, went on or ended, with the time in UTC:

    {"event": "started", "step": 0, "time": "2026-01-02T03:04:05+00:00", "settings": {...}, "base": {...}, ...}
    {"event": "stopped", "step": 120, "time": ..., "reason": "SIGTERM"}
    {"event": "resumed", "step": 120, "time": ..., "settings": {...}, ...}
    {"event": "finished", "step": 200, "time": ..., "early": false}

The others are `failed`, with its reason, and `observer_lost`, with its name and reason. A killed run leaves no line.
"""

from __future__ import annotations

import collections
import json
import signal
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Protocol

from torch import nn

from qlora_lite.compute.random_state import RandomSources
from qlora_lite.errors import Stopped
from qlora_lite.lora.adapters import lora_layers
from qlora_lite.quantization.packed_weight import PackedWeight
from qlora_lite.training.metrics import Evaluation, StepMetrics
from qlora_lite.training.run_state import Run

EVENTS_FILE = "events.jsonl"
STARTED, RESUMED, FINISHED, STOPPED, FAILED = "started", "resumed", "finished", "stopped", "failed"
OBSERVER_LOST = "observer_lost"
LONGEST_REASON = 1000  # characters

Facts = Mapping[str, object]


class RunObserver(Protocol):
    """Is told what happens in a run, in the process that writes its files.

    If a call after `started` raises, the run goes on without the observer, and says so.
    """

    @property
    def name(self) -> str:
        """How messages call it."""

    def started(self, step: int, facts: Facts) -> None:
        """After the first step of this call of `train`. step: 0, or the step after which the run goes on.

        facts: `run_facts`. If it raises, the run ends with this error.
        """

    def step(self, metrics: StepMetrics) -> None:
        """After each step."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """After each evaluation of held-out batches; that before the first step is told after `started`."""

    def ended(self, event: str, reason: str) -> None:
        """At the end: `finished`, `stopped` or `failed`, and the reason of the last two."""


class Observers:
    """The observers of a run. They are told first that it started, and one that fails is told nothing more."""

    def __init__(self, observers: Iterable[RunObserver]) -> None:
        self._left = list(observers)
        self.have_started = False

    def tell(self, call: Callable[[RunObserver], None], run: Run, began_at: int) -> dict[str, str]:
        """Makes a call to each observer; returns the reason of each that failed, by its name.

        began_at: the step after which this call of `train` went on.
        """
        is_first, self.have_started = not self.have_started, True
        lost: dict[str, str] = {}
        if not self._left:
            return lost
        # Libraries draw random numbers when they are imported or name a run; the run must not notice.
        sources = run.sources or RandomSources(next(run.model.parameters()).device)
        random = sources.capture()
        evaluations = run.evaluations if is_first and began_at == 0 else ()
        for observer in self._left if is_first else ():
            observer.started(began_at, run_facts(run))
        for observer in list(self._left):
            try:
                for evaluation in evaluations:
                    observer.evaluated(evaluation)
                call(observer)
            except Exception as error:  # noqa: PERF203  of any library
                lost[observer.name] = reason_of(error)
                self._left.remove(observer)
        sources.restore(random)
        return lost


def run_facts(run: Run) -> dict[str, object]:
    """Returns settings, base and adapters of a run, as plain data."""
    model = run.model
    layers = lora_layers(model)
    adapters = {
        "layers": len(layers),
        "rank": _common(layer.rank for layer in layers.values()),
        "alpha": _common(layer.alpha for layer in layers.values()),
        "variant": _common(layer.variant.name for layer in layers.values()),
        "trained_parameters": sum(parameter.numel() for parameter in run.trained.values()),
    }
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    base = {"name": name, "class": type(model).__name__, "packed": _formats(model)}
    return {"settings": asdict(run.config), "base": base, "adapters": adapters}


def _common(values: Iterable[object]) -> object:
    """Returns the value that most layers have; with several ones, all of them as text."""
    found = collections.Counter(values)
    ordered = [value for value, _ in found.most_common()]
    return ordered[0] if len(ordered) == 1 else ", ".join(map(str, ordered)) or None


def _formats(model: nn.Module) -> dict[str, int]:
    """Returns the number of packed weights in each format."""
    return dict(collections.Counter(module.format for module in model.modules() if isinstance(module, PackedWeight)))


def event_line(event: str, step: int, facts: Facts) -> str:
    """Returns a line of events.jsonl, with its end."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return json.dumps({"event": event, "step": step, "time": now, **facts}, default=str) + "\n"


def ending_by(error: BaseException) -> tuple[str, str]:
    """Returns the event of a run that ends by an exception, and the reason."""
    if isinstance(error, Stopped):
        return STOPPED, signal.Signals(error.number).name
    return FAILED, reason_of(error)


def reason_of(error: BaseException) -> str:
    """Returns an error as one line."""
    name = f"{type(error).__name__}: " if str(error) else type(error).__name__
    return " ".join(f"{name}{error}".split())[:LONGEST_REASON]
