"""Trackers of experiments, through accelerate's classes for them: TensorBoard, Weights & Biases, Trackio and MLflow.

    train(model, batches, config, output_dir="out/run", observers=open_trackers(["tensorboard"], "out/run"))

A tracker gets the figures of metrics.jsonl as `train/loss`, `eval/loss` and so on, and the settings of the run. It
starts with the first step. A resumed run goes on in the same run of the tracker, and no step is there twice:
`trackers.json` in the run's folder has the names that the trackers gave their runs, and the last step that each was
told. TensorBoard is told to forget later steps instead.

If a tracker cannot start, the run ends, which has cost one step. If it fails later, the run goes on without it, with a
sentence on stderr and in events.jsonl: metrics.jsonl has the figures.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora_lite.checkpoints.files import read_json
from qlora_lite.errors import CheckpointError, ConfigError, TrainingError, listing
from qlora_lite.training.metrics import HELD_OUT_LOSS, Evaluation, StepMetrics
from qlora_lite.training.observers import Facts, RunObserver, reason_of

TENSORBOARD, WANDB, TRACKIO, MLFLOW = TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
PROJECT = "qlora-lite"  # of the trackers that sort runs into projects; their own environment variables come first
STATE_FILE = "trackers.json"
WITHOUT_KEY = ("offline", "disabled", "dryrun")  # modes of wandb


def open_trackers(names: Iterable[str], output_dir: str | Path) -> list[RunObserver]:
    """Returns observers for `train` that tell these trackers of a run. output_dir: that of the run.

    Raises ConfigError for unknown names, libraries that are not installed, and a wandb without a key.
    """
    chosen = list(dict.fromkeys(names))
    if unknown := [name for name in chosen if name not in TRACKERS]:
        raise ConfigError(f"unknown trackers: {listing(unknown)}; known are {', '.join(TRACKERS)}")
    if missing := [name for name in chosen if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"tracking needs what is not installed; run: pip install {' '.join(missing)}")
    if WANDB in chosen:
        _check_wandb_key()
    return [Tracker(name, Path(output_dir)) for name in chosen]


def _check_wandb_key() -> None:
    """Raises ConfigError if wandb would ask for a key in the middle of the run."""
    if os.environ.get("WANDB_MODE") in WITHOUT_KEY or os.environ.get("WANDB_API_KEY"):
        return
    host = os.environ.get("WANDB_BASE_URL", "api.wandb.ai").removeprefix("https://").removeprefix("http://")
    netrc = Path(os.environ.get("NETRC", Path.home() / (".netrc" if os.name != "nt" else "_netrc")))
    with contextlib.suppress(OSError):
        if host in netrc.read_text(encoding="utf-8", errors="replace"):
            return
    raise ConfigError("wandb has no key; run: wandb login, or set WANDB_MODE=offline")


def flat(facts: Mapping[str, object], before: str = "") -> dict[str, Any]:
    """Returns nested settings as one level of numbers and texts: `settings/steps`."""
    found: dict[str, Any] = {}
    for key, value in facts.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping):
            found |= flat(value, f"{name}/")
        elif isinstance(value, (bool, int, float, str)):
            found[name] = value
        else:
            found[name] = str(value)
    return found


class Tracker:
    """An observer of a run that hands its figures to one of accelerate's trackers. folder: of the run."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.name = f"the tracker {kind}"
        self._kind, self._folder = kind, folder
        self._tracker: Any = None
        self._state: dict[str, Any] = {"id": "", "step": 0, "evaluation": -1}

    def started(self, step: int, facts: Facts) -> None:
        """Starts the tracker's run, or goes on with it. Raises TrainingError if it cannot."""
        is_new = True
        if step > 0 and (stored := self._stored()) is not None:
            self._state, is_new = stored, False
        try:
            with contextlib.redirect_stdout(sys.stderr):  # some of them print
                self._tracker = self._made(step, is_new)
                self._tracker.start()
                if is_new:
                    self._tracker.store_init_configuration(flat(facts))
                if self._kind == MLFLOW:
                    self._state["id"] = self._tracker.tracker.info.run_id
        except Exception as error:  # of any library
            raise TrainingError(f"{self.name} cannot start ({reason_of(error)}); train without it") from error
        self._write_state()

    def step(self, metrics: StepMetrics) -> None:
        """Hands on the figures of a step."""
        figures = {
            "loss": metrics.loss,
            "gradient_norm": metrics.gradient_norm,
            "learning_rate": metrics.learning_rate,
            "tokens": metrics.tokens,
            "tokens_per_second": metrics.tokens_per_second,
            "peak_bytes": metrics.peak_bytes,
        }
        self._log("train", "step", metrics.step, figures)

    def evaluated(self, evaluation: Evaluation) -> None:
        """Hands on the held-out loss and the scores."""
        figures = {"loss": evaluation.to_line()[HELD_OUT_LOSS], **evaluation.scores, "seconds": evaluation.seconds}
        self._log("eval", "evaluation", evaluation.step, figures)

    def ended(self, event: str, reason: str) -> None:
        """Ends the tracker's run."""
        finish = self._tracker.finish
        if self._kind == TRACKIO:  # its own function leaves nothing to end, and to print on stdout, when Python exits
            finish = getattr(sys.modules.get(TRACKIO), "finish", finish)
        with contextlib.redirect_stdout(sys.stderr):
            finish()

    def _log(self, group: str, what: str, step: int, figures: Mapping[str, object]) -> None:
        """Hands on figures of a step, unless they were before the run was resumed."""
        if step <= self._state[what] and self._kind != TENSORBOARD:
            return
        known = {f"{group}/{name}": value for name, value in figures.items() if value is not None}
        with contextlib.redirect_stdout(sys.stderr):
            self._tracker.log(known, step=step)
        self._state[what] = step
        self._write_state()

    def _made(self, step: int, is_new: bool) -> Any:
        """Returns the tracker, not started yet."""
        from accelerate import PartialState, tracking

        PartialState()  # which accelerate's loggers ask for
        run = self._folder.resolve().name
        self._state["id"] = self._state["id"] or f"{run}-{secrets.token_hex(3)}"
        if self._kind == TENSORBOARD:
            if is_new and step == 0:
                shutil.rmtree(self._folder / TENSORBOARD, ignore_errors=True)  # of a run that this one overwrites
            return tracking.TensorBoardTracker(TENSORBOARD, self._folder, purge_step=step + 1 if step else None)
        if self._kind == WANDB:
            options: dict[str, Any] = {"id": self._state["id"], "name": run, "dir": str(self._folder)}
            return tracking.WandBTracker(os.environ.get("WANDB_PROJECT", PROJECT), resume="allow", **options)
        if self._kind == TRACKIO:
            options = {"name": self._state["id"], "resume": "allow", "embed": False}
            return tracking.TrackioTracker(os.environ.get("TRACKIO_PROJECT", PROJECT), **options)
        return tracking.MLflowTracker(PROJECT, run_id=None if is_new else self._state["id"], run_name=run)

    def _states(self) -> dict[str, Any]:
        try:
            return read_json(self._folder / STATE_FILE)
        except CheckpointError:  # none yet, or damaged: the tracker then begins a new run
            return {}

    def _stored(self) -> dict[str, Any] | None:
        found = self._states().get(self._kind)
        return found if isinstance(found, dict) and found.keys() == self._state.keys() else None

    def _write_state(self) -> None:
        """Notes what was told. A killed run leaves the old file or the new one."""
        temporary = self._folder / f".{STATE_FILE}.{self._kind}.partial"
        temporary.write_text(json.dumps({**self._states(), self._kind: self._state}), encoding="utf-8")
        os.replace(temporary, self._folder / STATE_FILE)
