"""The history of a run, read from its folder: also of a run that goes on, and from files that are damaged.

metrics.jsonl, events.jsonl, data.json and adapter/ are read; the first one must be there, or a run at work. Lines that
cannot be read are left out and listed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from qlora_lite.checkpoints.files import did_you_mean, open_regular, read_json
from qlora_lite.checks import is_count, is_finite
from qlora_lite.errors import CheckpointError
from qlora_lite.system import LOCK_FILE, is_locked
from qlora_lite.training.config import BEST_BY, LOSS
from qlora_lite.training.metrics import Evaluation, StepMetrics, best_evaluation, is_evaluation
from qlora_lite.training.observers import EVENTS_FILE, FAILED, FINISHED, RESUMED, STARTED, STOPPED
from qlora_lite.training.run_checkpoints import ADAPTER_FOLDER, DATA_FILE, METRICS_FILE, RUN_FILE, is_run

ADAPTER_CONFIG = "adapter_config.json"
LONGEST_LINE = 1 << 20  # bytes; a longer one is not a line of a run
RUNNING, UNKNOWN = "running", "ended without a word"
NAMES_OF_STEP = {field.name for field in fields(StepMetrics)}


@dataclass(frozen=True)
class Damage:
    """A line that was left out, and why."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True)
class RunHistory:
    """A run as its folder tells it.

    steps, evaluations: in order, without damaged ones; losses may be NaN. events: the lines of events.jsonl.
    data: data.json, adapter: the settings of the adapter as peft has them; None where there is no sound file.
    configuration: the text of run.yaml. is_running: whether a process is writing it.
    label: its name on a page with another run of the same folder name.
    """

    folder: Path
    steps: Sequence[StepMetrics]
    evaluations: Sequence[Evaluation]
    events: Sequence[Mapping[str, Any]]
    data: Mapping[str, Any] | None
    adapter: Mapping[str, Any] | None
    configuration: str | None
    damage: Sequence[Damage]
    is_running: bool
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or self.folder.resolve().name or str(self.folder)

    @property
    def facts(self) -> Mapping[str, Any]:
        """Settings, base and adapters, as of the last time that the run started or went on; empty if not known."""
        began = [event for event in self.events if event["event"] in (STARTED, RESUMED)]
        return began[-1] if began else {}

    @property
    def settings(self) -> Mapping[str, Any]:
        found = self.facts.get("settings")
        return found if isinstance(found, dict) else {}

    @property
    def total_steps(self) -> int | None:
        """The steps that the run was to make; None if that is not known."""
        steps = self.settings.get("steps")
        return steps if is_count(steps, 1) else None

    @property
    def last_step(self) -> int:
        return self.steps[-1].step if self.steps else 0

    @property
    def best_by(self) -> str:
        """What its evaluations are compared by."""
        by = self.settings.get("best_by")
        return by if by in BEST_BY else LOSS

    @property
    def best(self) -> Evaluation | None:
        return best_evaluation(self.evaluations, self.best_by)

    @property
    def ending(self) -> Mapping[str, Any] | None:
        """The event that the run ended with; None while it goes on, and if it was killed."""
        last = [event for event in self.events if event["event"] in (STARTED, RESUMED, FINISHED, STOPPED, FAILED)]
        return last[-1] if last and last[-1]["event"] in (FINISHED, STOPPED, FAILED) and not self.is_running else None

    @property
    def status(self) -> str:
        """How it stands with the run, in a few words."""
        if self.is_running:
            return RUNNING
        if self.ending is None:
            return "finished" if self.last_step == self.total_steps else UNKNOWN
        event, reason = self.ending["event"], self.ending.get("reason", "")
        if event == FINISHED:
            return "stopped early" if self.ending.get("early") else "finished"
        return f"stopped by {reason}" if event == STOPPED else "failed"

    @property
    def tokens(self) -> int:
        return sum(step.tokens for step in self.steps)

    @property
    def seconds(self) -> float:
        """The seconds of all steps and evaluations."""
        steps = sum(step.tokens / step.tokens_per_second for step in self.steps if step.tokens_per_second > 0)
        return steps + sum(evaluation.seconds for evaluation in self.evaluations)

    @property
    def peak_bytes(self) -> int | None:
        """The largest peak of a step; None if none is known."""
        return max((step.peak_bytes for step in self.steps if step.peak_bytes is not None), default=None)

    def figures(self) -> dict[str, object]:
        """Returns what a run has come to, as plain data. NaN is None, which JSON has."""
        best, last = self.best, self.evaluations[-1] if self.evaluations else None
        losses = [step.loss if is_finite(step.loss) else None for step in (*self.steps[:1], *self.steps[-1:])]
        return {
            "run": str(self.folder),
            "state": self.status,
            "steps": self.last_step,
            "of_steps": self.total_steps,
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "best_step": None if best is None else best.step,
            "best_held_out_loss": None if best is None else best.held_out_loss,
            **({} if best is None or self.best_by == LOSS else {f"best_{self.best_by}": best.scores.get(self.best_by)}),
            **({} if last is None else {f"last_{name}": value for name, value in last.scores.items()}),
            "tokens": self.tokens,
            "seconds": round(self.seconds, 1),
            "peak_bytes": self.peak_bytes,
            "damaged_lines": len(self.damage),
        }

    @property
    def seconds_left(self) -> float | None:
        """What the rest of a running run takes at the speed so far; None if that is not known."""
        if not self.is_running or self.total_steps is None or not self.steps:
            return None
        return self.seconds / self.last_step * (self.total_steps - self.last_step)


def labelled(runs: Sequence[RunHistory]) -> list[RunHistory]:
    """Returns the runs, with their whole paths as labels where the names of their folders are not enough."""
    names = [run.name for run in runs]
    return [replace(run, label=str(run.folder)) if names.count(run.name) > 1 else run for run in runs]


def is_before_run(folder: str | Path) -> bool:
    """Whether a folder does not exist, or is empty, so that a run may begin there."""
    folder = Path(folder)
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def read_history(folder: str | Path) -> RunHistory:
    """Reads the history of a run. Raises CheckpointError for a folder that is not that of a run."""
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        hint = "" if folder.exists() else did_you_mean(folder, is_run)
        raise CheckpointError(f"{folder} {what}; name the --output folder of a run of train{hint}")
    is_running = is_locked(folder / LOCK_FILE)
    if not (folder / METRICS_FILE).exists() and not is_running:
        raise CheckpointError(
            f"{folder} is not the folder of a run with a finished step: it has no {METRICS_FILE}; "
            f"name the --output folder of train"
        )
    if is_running and _is_of_earlier_run(folder):
        return RunHistory(folder, [], [], [], None, None, None, [], is_running)
    damage: list[Damage] = []
    steps, evaluations = _figures(folder / METRICS_FILE, damage, is_running)
    events = list(_events(folder / EVENTS_FILE, damage, is_running))
    if not steps and not is_running:
        raise CheckpointError(f"{folder / METRICS_FILE} has no line of a step; there is nothing to draw")
    data, adapter = _json(folder / DATA_FILE, damage), _json(folder / ADAPTER_FOLDER / ADAPTER_CONFIG, damage)
    read = steps, evaluations, events, data, adapter, _text(folder / RUN_FILE)
    return RunHistory(folder, *read, damage, is_running)


def _is_of_earlier_run(folder: Path) -> bool:
    """Whether the run at work has written nothing yet, so that all that is there will be replaced.

    A run writes the file of its lock when it begins, and gives it the time of the metrics if it goes on.
    """
    try:
        return os.stat(folder / METRICS_FILE).st_mtime_ns < os.stat(folder / LOCK_FILE).st_mtime_ns
    except OSError:  # one of them is not there, or not any more
        return False


def _text(path: Path) -> str | None:
    if not path.exists():
        return None
    with open_regular(path, "the configuration of a run", LONGEST_LINE) as file:
        return file.read().decode("utf-8", errors="replace")


def _json(path: Path, damage: list[Damage]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return read_json(path)
    except CheckpointError as error:
        damage.append(Damage(path.name, 0, str(error)))
        return None


def _lines(path: Path, damage: list[Damage], is_running: bool) -> Iterator[tuple[int, Any]]:
    """Yields number and content of each sound line; a last line that is still written is passed over."""
    if not path.exists():
        return
    with open_regular(path, "the metrics or events of a run") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
            if is_running and not line.endswith(b"\n"):
                return
            try:
                yield number, json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError):
                damage.append(Damage(path.name, number, "is not JSON"))


def _events(path: Path, damage: list[Damage], is_running: bool) -> Iterator[dict[str, Any]]:
    for number, line in _lines(path, damage, is_running):
        if isinstance(line, dict) and isinstance(line.get("event"), str) and is_count(line.get("step"), 0):
            yield line
        else:
            damage.append(Damage(path.name, number, "is not an event"))


def _figures(path: Path, damage: list[Damage], is_running: bool) -> tuple[list[StepMetrics], list[Evaluation]]:
    """Returns the steps and evaluations of a file. Of two lines of a step, the later one counts."""
    steps: dict[int, StepMetrics] = {}
    evaluations: dict[int, Evaluation] = {}
    for number, line in _lines(path, damage, is_running):
        try:
            if is_evaluation(line):
                evaluation = Evaluation.read(line)
                evaluations[evaluation.step] = evaluation
            else:
                step = _step(line)
                if step.step in steps:
                    damage.append(Damage(path.name, number, f"is a second line of step {step.step}"))
                steps[step.step] = step
        except CheckpointError as error:  # noqa: PERF203  each line is judged by itself
            damage.append(Damage(path.name, number, str(error).removeprefix(f"{METRICS_FILE} has ")))
    return [steps[key] for key in sorted(steps)], [evaluations[key] for key in sorted(evaluations)]


def _step(line: object) -> StepMetrics:
    """Returns the step of a line. Raises CheckpointError if it is not one; its loss may be NaN."""
    if not isinstance(line, dict):
        raise CheckpointError(f"a {type(line).__name__}")
    if not is_count(line.get("step"), 1):
        raise CheckpointError("no number of a step")
    # Versions before a figure was noted lack it.
    wrong = [name for name in NAMES_OF_STEP - {"peak_bytes"} if not _is_number(line.get(name))]
    peak = line.get("peak_bytes")
    if wrong or not (peak is None or is_count(peak, 0)):
        raise CheckpointError(f"no number for {', '.join(sorted(wrong)) or 'peak_bytes'}")
    known: dict[str, Any] = {name: line.get(name) for name in NAMES_OF_STEP}
    return StepMetrics(**known)


def _is_number(value: object) -> bool:
    return isinstance(value, float) or is_finite(value)  # NaN too, and no int above the largest float
