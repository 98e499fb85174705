"""The folder of a training run: `metrics.jsonl`, one line for each step, `data.json`, `adapter/` and `checkpoints/`.

With evaluations during training, `best_adapter/` holds the adapter of the best one so far.

`adapter/` holds the last values known to be good: those with which a finite loss was computed. They are saved before
the next update (not before every update, if saving takes long), so that a run that diverges leaves the adapter that it
had before.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from qlora_lite.checkpoints.atomic_folder import check_replaceable
from qlora_lite.checkpoints.files import new_file, write_json
from qlora_lite.errors import CheckpointError, ConfigError, NotFiniteError, Stopped, listing
from qlora_lite.lora.peft.save_load import save_adapter
from qlora_lite.progress.work import tell
from qlora_lite.signals import deferred_signals, uninterrupted
from qlora_lite.system import LOCK_FILE, locked_folder
from qlora_lite.training.metrics import Evaluation, StepMetrics, best_evaluation, line_of
from qlora_lite.training.observers import (
    EVENTS_FILE,
    FINISHED,
    OBSERVER_LOST,
    RESUMED,
    STARTED,
    Observers,
    RunObserver,
    ending_by,
    event_line,
    run_facts,
)
from qlora_lite.training.run_checkpoints import (
    ADAPTER_FOLDER,
    BEST_FOLDER,
    CHECKPOINTS,
    DATA_FILE,
    METRICS_FILE,
    RUN_FILE,
    checkpoint_path,
    leftovers,
    newest_intact_checkpoint,
    remove_folder,
    remove_leftovers,
    remove_old_checkpoints,
    write_checkpoint,
)
from qlora_lite.training.run_state import Run

# Saving the adapter between two steps may take this part of a run's time.
SAVING_SHARE = 0.02


class RunFolder:
    """Writes what a run leaves on disk; without a folder, nothing.

    check: raises CheckpointError if the folder does not exist any more. notes: about the run's data, for `data.json`.
    settings: the text of `run.yaml`; None writes none. observers: are told of steps, also without a folder.
    resumed_from, skipped: set by `resume`.
    """

    def __init__(
        self,
        run: Run,
        folder: Path | None,
        check: Callable[[], None] = lambda: None,
        notes: Mapping[str, object] | None = None,
        settings: str | None = None,
        observers: Sequence[RunObserver] = (),
    ) -> None:
        self._run, self._folder, self._check, self._notes = run, folder, check, notes
        self._settings = settings  # until it is written
        self._observers, self._began_at = Observers(observers), 0
        self._mode = "w"
        self._next_save = 0.0
        self._checkpoint_step: int | None = None  # of the last checkpoint
        self.saved = False
        self.failed = False
        self.resumed_from: Path | None = None
        self.skipped: list[str] = []

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Within the block no signal stops anything. After a failure, nothing is written when the run ends by it."""
        try:
            self._check()
            with uninterrupted():
                yield
        except (OSError, CheckpointError):
            self.failed = True
            raise

    def save_adapter(self) -> None:
        """Writes the adapter with its current values."""
        if self._folder is not None:
            self._save_adapter_to(self._folder / ADAPTER_FOLDER)
            self.saved = True

    def _save_adapter_to(self, folder: Path) -> None:
        with self._writing():
            save_adapter(self._run.model, folder, overwrite=True, training=self._run.record())

    def before_update(self) -> None:
        """Saves the adapter if it is time to. To be called after a finite loss, before the parameters change."""
        started = time.monotonic()
        if self._folder is None or started < self._next_save:
            return
        if self._mode == "w":
            with self._writing():  # those of an overwritten run, which this one must not be resumed from
                for name in (CHECKPOINTS, BEST_FOLDER):
                    if (self._folder / name).is_dir():
                        remove_folder(self._folder / name)
        self.save_adapter()
        ended = time.monotonic()
        self._next_save = ended + (ended - started) / SAVING_SHARE

    def finish_step(self, metrics: StepMetrics) -> None:
        """Writes the metrics of a step, and notes in the run that it is finished."""
        if self._folder is not None:
            with self._writing():
                if self._mode == "w" and self._notes is not None:
                    write_json(self._folder / DATA_FILE, self._notes)
                if self._settings is not None:  # also of a resumed run: what it saves and keeps may have changed
                    with new_file(self._folder / RUN_FILE, overwrite=True) as file:
                        file.write(self._settings.encode())
                    self._settings = None
                if self._mode == "w":
                    self._append(self._folder / EVENTS_FILE, event_line(STARTED, 0, run_facts(self._run)))
                # The first line of a file replaces that of another run, so an evaluation before it waits for it.
                before = self._run.evaluations if self._mode == "w" else ()
                self._append(self._folder / METRICS_FILE, "".join(map(line_of, (*before, metrics))))
        self._mode = "a"
        self._run.finish_step(metrics)
        self._tell_observers(lambda observer: observer.step(metrics))

    def finish_evaluation(self, evaluation: Evaluation) -> None:
        """Notes an evaluation in the run, writes its line, and keeps the adapter if it is the best one."""
        run, by = self._run, self._run.config.best_by
        best = best_evaluation(run.evaluations, by)
        run.evaluations.append(evaluation)
        if self._checkpoint_step == run.steps:
            self._checkpoint_step = None  # its checkpoint was written without the evaluation
        if run.steps == 0:
            return
        if self._folder is not None:
            if run.config.eval_steps is not None and best_evaluation(run.evaluations, by) != best:
                self._save_adapter_to(self._folder / BEST_FOLDER)
            with self._writing():
                self._append(self._folder / METRICS_FILE, line_of(evaluation))
        self._tell_observers(lambda observer: observer.evaluated(evaluation))

    def _tell_observers(self, call: Callable[[RunObserver], None]) -> None:
        for name, reason in self._observers.tell(call, self._run, self._began_at).items():
            tell(f"{name} failed after step {self._run.steps} and is told nothing more: {reason}")
            self._write_event(OBSERVER_LOST, {"observer": name, "reason": reason})

    def _write_event(self, event: str, facts: Mapping[str, object]) -> None:
        """Writes a line of events.jsonl, if the run has written anything and can still write."""
        if self._folder is not None and self._mode == "a" and not self.failed:
            with self._writing():
                self._append(self._folder / EVENTS_FILE, event_line(event, self._run.steps, facts))

    def end(self, event: str, facts: Mapping[str, object], reason: str = "") -> None:
        """Notes how the run ended."""
        if self._observers.have_started:
            self._tell_observers(lambda observer: observer.ended(event, reason))
        self._write_event(event, facts)

    def write_due_checkpoint(self, is_last: bool) -> None:
        """Writes a checkpoint if one is due after the last finished step. is_last: whether the run ends there."""
        steps, every = self._run.steps, self._run.config.save_steps
        if every is not None and (steps % every == 0 or is_last):
            self.write_checkpoint()

    def _append(self, path: Path, line: str) -> None:
        """Appends a line, or nothing if the disk becomes full within it. Ends a line first that a kill cut short."""
        with open(path, f"{self._mode}+b", buffering=0) as metrics:
            before = metrics.seek(0, os.SEEK_END)
            metrics.seek(max(0, before - 1))
            is_cut = metrics.read(1) not in (b"", b"\n")
            left = memoryview(("\n" * is_cut + line).encode())
            try:
                while left:
                    left = left[metrics.write(left) :]
            except OSError:
                metrics.truncate(before)
                raise

    def write_checkpoint(self) -> Path | None:
        """Writes the checkpoint of the last finished step, unless it exists; returns its path, None before a step."""
        if self._folder is None or self._run.steps == 0:
            return None
        path = checkpoint_path(self._folder, self._run.steps)
        if self._checkpoint_step != self._run.steps:
            with self._writing():
                write_checkpoint(path, self._run.write)
            self._checkpoint_step = self._run.steps
            self._remove_old_checkpoints()
        return path

    def _remove_old_checkpoints(self) -> None:
        if self._folder is not None and self._checkpoint_step is not None:
            config = self._run.config
            with self._writing():
                by = None if config.eval_steps is None else config.best_by
                remove_old_checkpoints(self._folder, self._checkpoint_step, config.keep_last, config.keep_best, by)

    def finish(self) -> None:
        """Saves the adapter at the end of the run, and removes old checkpoints that a killed run may have left."""
        self.save_adapter()
        self._remove_old_checkpoints()

    def resume(self, path: Path) -> str:
        """Gives the run the state of its newest intact checkpoint; returns a sentence for the user.

        path: the run's folder, which all processes of a run read and the first one writes.
        """
        checkpoint, self.skipped = newest_intact_checkpoint(path)
        if checkpoint is None:
            return f"{path} has no checkpoint; training starts at step 1"
        self._run.check_same(checkpoint)
        self._run.restore_(checkpoint)
        if self._folder is not None:
            with self._writing():
                self._run.write_metrics(self._folder / METRICS_FILE)
                self._mode = "a"
                self._append(self._folder / EVENTS_FILE, event_line(RESUMED, self._run.steps, run_facts(self._run)))
        self._began_at = self._run.steps
        self.resumed_from, self._checkpoint_step, self._mode, self.saved = checkpoint, self._run.steps, "a", True
        return "; skipped ".join([f"going on after step {self._run.steps} from {checkpoint}", *self.skipped])

    def stopped_by(self, stop: Stopped) -> Stopped:
        """Saves a checkpoint and the adapter; returns the exception to raise, which says where they are."""
        name = signal.Signals(stop.number).name
        path = self.write_checkpoint()
        if path is None:
            return Stopped(stop.number, f"stopped by {name} before the first step was done")
        self.save_adapter()
        done = f"stopped by {name} after step {self._run.steps} of {self._run.config.steps}"
        return Stopped(stop.number, f"{done}; resuming continues from {path}")


def _check_writable(folder: Path, overwrite: bool, resume: bool) -> None:
    if overwrite and resume:
        raise ConfigError("overwrite starts a run again and resume continues it; ask for one of them")
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; name a folder")
    names = {path.name for path in folder.iterdir()} - {LOCK_FILE} if folder.is_dir() else set()
    if names and not (overwrite or resume):
        raise CheckpointError(f"{folder} is not empty; name another folder, or ask for overwrite")
    names -= {path.name for path in leftovers(folder)}
    if resume and names and not names & {METRICS_FILE, ADAPTER_FOLDER, CHECKPOINTS}:
        raise CheckpointError(f"{folder} does not hold a run to resume; it has {listing(sorted(names), 4)}")
    check_replaceable(folder / ADAPTER_FOLDER, overwrite or resume)


@contextmanager
def run_folder(
    run: Run,
    folder: Path | None,
    overwrite: bool,
    resume: bool = False,
    notes: Mapping[str, object] | None = None,
    settings: str | None = None,
    observers: Sequence[RunObserver] = (),
) -> Iterator[RunFolder]:
    """Within the block a run may write into a folder, and no other run.

    folder: None writes nothing. notes, settings: written to `data.json` and `run.yaml` with the first step.
    observers: as in `RunFolder`.
    At the end of the block, also by an error, the adapter is saved, unless it has diverged. On Stopped a checkpoint is
    written too; a KeyboardInterrupt saves nothing. Existing files are not touched before the first finite loss, and a
    new folder that nothing was written to is removed.
    Raises ConfigError if both `overwrite` and `resume` are asked for, and CheckpointError if the folder has other
    content than allowed, is used by another run or cannot be written.
    """
    if folder is None:
        with deferred_signals() if run.sources is not None else nullcontext():
            writer = RunFolder(run, None, observers=observers)
            with _end_told(writer, run):
                yield writer
        return
    _check_writable(folder, overwrite, resume)
    target = Path(os.path.realpath(folder))  # of a link
    is_new = not target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        with deferred_signals(), locked_folder(folder) as check:
            _check_writable(folder, overwrite, resume)  # again: another run may have ended meanwhile
            remove_leftovers(folder)
            if resume and (folder / METRICS_FILE).exists():
                written = os.stat(folder / METRICS_FILE).st_mtime_ns
                os.utime(folder / LOCK_FILE, ns=(written, written))  # not newer: they are its own (reports/history.py)
            writer = RunFolder(run, folder, check, notes, settings, observers)
            with _end_told(writer, run):
                with _saved_on_error(writer, folder):
                    yield writer
                writer.finish()
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        if is_new and target.is_dir() and not any(target.iterdir()):
            target.rmdir()


@contextmanager
def _end_told(writer: RunFolder, run: Run) -> Iterator[None]:
    """Notes how the block ends. Errors of that do not take the place of the run's own."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        event, reason = ending_by(error)
        with suppress(OSError, CheckpointError):
            writer.end(event, {"reason": reason}, reason)
        raise
    writer.end(FINISHED, {"early": run.steps < run.config.steps})


@contextmanager
def _saved_on_error(writer: RunFolder, folder: Path) -> Iterator[None]:
    """Saves what is good if the block ends by an exception."""
    try:
        yield
    except NotFiniteError as error:
        if not writer.saved:
            raise
        adapter = folder / ADAPTER_FOLDER
        raise NotFiniteError(f"{error}; {adapter} holds an adapter that gave a finite loss") from error
    except Stopped as stop:
        raise writer.stopped_by(stop) from None
    except KeyboardInterrupt:
        raise
    except BaseException:
        if writer.saved and not writer.failed:
            writer.save_adapter()
        raise
