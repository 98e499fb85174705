"""The folder of a training run: `metrics.jsonl`, a line a step, `adapter/`, the last values known to be good, and
`checkpoints/`, from which a run goes on.

Values are known to be good when a loss computed with them is finite. They are saved then, before the next update
(not at every step, if saving takes long), so that a run that diverges leaves the adapter that it had before.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from qlora_lite.checkpoints.atomic_folder import check_replaceable
from qlora_lite.errors import CheckpointError, ConfigError, NotFiniteError, Stopped, listing
from qlora_lite.lora.peft.save_load import save_adapter
from qlora_lite.signals import deferred_signals, uninterrupted
from qlora_lite.training.run_checkpoints import (
    ADAPTER_FOLDER,
    CHECKPOINTS,
    METRICS_FILE,
    checkpoint_path,
    keep_only,
    newest_sound,
    remove_folder,
    remove_unfinished,
    unfinished,
    write_checkpoint,
)
from qlora_lite.training.run_state import RunState

# Saving may take this share of a run's time.
SAVING_SHARE = 0.02

LOCK_FILE = ".run.lock"


class RunFolder:
    """What a run writes; without a folder, nothing.

    state: what checkpoints are made of; check: raises if the folder is not there any more.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: Path | None,
        state: RunState | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._model, self._folder, self._state, self._check = model, folder, state, check
        self._mode = "w"
        self._next_save = 0.0
        self._at: int | None = None  # the step of the last checkpoint
        self.saved = False
        self.failed = False
        self.resumed_from: Path | None = None
        self.skipped: list[str] = []

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Whole, whatever signal comes; what failed once is not tried again when the run ends by it."""
        try:
            self._check()
            with uninterrupted():
                yield
        except (OSError, CheckpointError):
            self.failed = True
            raise

    def save(self) -> None:
        """Writes the adapter as it is now."""
        if self._folder is not None:
            with self._writing():
                save_adapter(self._model, self._folder / ADAPTER_FOLDER, overwrite=True)
            self.saved = True

    def good(self) -> None:
        """The adapter has just given a finite loss, and is about to be changed."""
        began = time.monotonic()
        if self._folder is None or began < self._next_save:
            return
        if self._mode == "w" and (self._folder / CHECKPOINTS).is_dir():
            with self._writing():  # another run's, from which this one must not go on
                remove_folder(self._folder / CHECKPOINTS)
        self.save()
        ended = time.monotonic()
        self._next_save = ended + (ended - began) / SAVING_SHARE

    def note(self, step: Any, facts: dict[str, Any] | None = None) -> None:
        """A step is done: a line of the metrics, and a checkpoint if one is due.

        step: a dataclass; facts: what the loop goes on by (RunState.mark).
        """
        if self._folder is None:
            return
        with self._writing():
            self._append(self._folder / METRICS_FILE, json.dumps(asdict(step)) + "\n")
        self._mode = "a"
        if self._state is None:
            return
        self._state.mark(asdict(step), facts or {})
        done, every = self._state.steps, self._state.config.save_steps
        if every is not None and (done % every == 0 or done == self._state.config.steps):
            self.checkpoint(self._state)

    def _append(self, path: Path, line: str) -> None:
        """Of a line that a full disk takes half of, nothing stays."""
        with open(path, f"{self._mode}b", buffering=0) as metrics:
            before, left = metrics.seek(0, os.SEEK_END), memoryview(line.encode())
            try:
                while left:
                    left = left[metrics.write(left) :]
            except OSError:
                metrics.truncate(before)
                raise

    def checkpoint(self, state: RunState) -> Path | None:
        """The checkpoint of the last step that is done, written unless it is there; None before the first step."""
        if self._folder is None or state.steps == 0:
            return None
        path = checkpoint_path(self._folder, state.steps)
        if self._at != state.steps:
            with self._writing():
                write_checkpoint(path, state.write)
            self._at = state.steps
            self._let_go(state)
        return path

    def _let_go(self, state: RunState) -> None:
        if self._folder is not None and self._at is not None:
            with self._writing():
                keep_only(self._folder, self._at, state.config.keep_last, state.config.keep_best)

    def finish(self) -> None:
        """The run came to its end."""
        self.save()
        if self._state is not None:
            self._let_go(self._state)  # again: a killed run may have left more than are to be kept

    def resumed(self, place: Path, state: RunState) -> str:
        """Puts the run where its newest sound checkpoint left it, and says where that is and what was skipped.

        place: the run's folder, which other processes of a run read and do not write.
        """
        path, self.skipped = newest_sound(place)
        if path is None:
            return f"{place} has no checkpoint; training starts at step 1"
        state.check_same(path)
        state.restore_(path)
        if self._folder is not None:
            with self._writing():
                state.write_metrics(self._folder / METRICS_FILE)
        self.resumed_from, self._at, self._mode, self.saved = path, state.steps, "a", True
        return "; skipped ".join([f"going on after step {self._at} from {path}", *self.skipped])

    def stopped(self, stop: Stopped) -> Stopped:
        """Saves all that there is, and gives what to raise: a sentence that says so."""
        name = signal.Signals(stop.number).name
        path = None if self._state is None else self.checkpoint(self._state)
        if path is None or self._state is None:
            return Stopped(stop.number, f"stopped by {name} before the first step was done")
        self.save()
        done = f"stopped by {name} after step {self._state.steps} of {self._state.config.steps}"
        return Stopped(stop.number, f"{done}; {path} is where resuming goes on")


def _check_writable(folder: Path, overwrite: bool, resume: bool) -> None:
    if overwrite and resume:
        raise ConfigError("overwrite begins a run anew and resume goes on with one; ask for one of them")
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; name a folder")
    there = {path.name for path in folder.iterdir()} - {LOCK_FILE} if folder.is_dir() else set()
    if there and not (overwrite or resume):
        raise CheckpointError(f"{folder} is not empty; name another folder, or ask for overwrite")
    there -= {path.name for path in unfinished(folder)}
    if resume and there and not there & {METRICS_FILE, ADAPTER_FOLDER, CHECKPOINTS}:
        raise CheckpointError(f"{folder} holds no run to go on with, but {listing(sorted(there), 4)}")
    check_replaceable(folder / ADAPTER_FOLDER, overwrite or resume)


@contextmanager
def run_folder(
    model: nn.Module, folder: Path | None, overwrite: bool, resume: bool = False, state: RunState | None = None
) -> Iterator[RunFolder]:
    """A run goes inside. When it ends, by an error too, the adapter is saved, unless it is what diverged.

    Nothing that was there is touched before the first finite loss; a folder that nothing was written to is removed.
    No other run writes there meanwhile. On Stopped a checkpoint is written too; a KeyboardInterrupt saves nothing.
    """
    if folder is None:
        with deferred_signals() if state is not None else nullcontext():
            yield RunFolder(model, None)
        return
    _check_writable(folder, overwrite, resume)
    behind = Path(os.path.realpath(folder))  # of a link
    is_new = not behind.exists()
    try:
        behind.mkdir(parents=True, exist_ok=True)
        with deferred_signals(), only_run(folder) as check:
            _check_writable(folder, overwrite, resume)  # again: another run may have ended there just now
            remove_unfinished(folder)
            run = RunFolder(model, folder, state, check)
            with _ending(run, folder):
                yield run
            run.finish()
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        if is_new and behind.is_dir() and not any(behind.iterdir()):
            behind.rmdir()


@contextmanager
def _ending(run: RunFolder, folder: Path) -> Iterator[None]:
    """What is saved of a run that ends before its end."""
    try:
        yield
    except NotFiniteError as error:
        if not run.saved:
            raise
        where = folder / ADAPTER_FOLDER
        raise NotFiniteError(f"{error}; {where} holds an adapter that gave a finite loss") from error
    except Stopped as stop:
        raise run.stopped(stop) from None
    except KeyboardInterrupt:
        raise
    except BaseException:
        if run.saved and not run.failed:
            run.save()
        raise


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one of this name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _held(path: Path) -> int:
    """A descriptor of the file, locked. CheckpointError, naming the process, if another holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise CheckpointError(
                f"{path.parent} is being written by another run (process {owner}); wait for it, or name another folder"
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        if _is_at(path, descriptor):  # else its last owner has just removed it, and others make a new one
            return descriptor
        os.close(descriptor)


@contextmanager
def only_run(folder: Path) -> Iterator[Callable[[], None]]:
    """Holds the folder's lock, and gives a function that raises CheckpointError if the folder is not there any more."""
    path = folder / LOCK_FILE
    descriptor = _held(path)

    def check() -> None:
        if not _is_at(path, descriptor):
            raise CheckpointError(f"{folder} was removed, or replaced, while a run was writing there")

    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield check
    finally:
        if _is_at(path, descriptor):
            path.unlink()
        os.close(descriptor)
