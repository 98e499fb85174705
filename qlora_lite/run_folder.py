"""The folder of a training run: `metrics.jsonl`, a line a step, and `adapter/`, the last values known to be good.

Values are known to be good when a loss computed with them is finite. They are saved then, before the next update
(not at every step, if saving takes long), so that a run that diverges leaves the adapter that it had before.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from qlora_lite.adapter_files import save_adapter
from qlora_lite.errors import CheckpointError, NotFiniteError
from qlora_lite.storage import check_replaceable

METRICS_FILE = "metrics.jsonl"
ADAPTER_FOLDER = "adapter"
# Saving may take this share of a run's time.
SAVING_SHARE = 0.02


class RunFolder:
    """What a run writes; without a folder, nothing."""

    def __init__(self, model: nn.Module, folder: Path | None) -> None:
        self._model, self._folder = model, folder
        self._mode = "w"
        self._next_save = 0.0
        self.saved = False

    def save(self) -> None:
        """Writes the adapter as it is now."""
        if self._folder is not None:
            save_adapter(self._model, self._folder / ADAPTER_FOLDER, overwrite=True)
            self.saved = True

    def good(self) -> None:
        """The adapter has just given a finite loss, and is about to be changed."""
        began = time.monotonic()
        if self._folder is not None and began >= self._next_save:
            self.save()
            ended = time.monotonic()
            self._next_save = ended + (ended - began) / SAVING_SHARE

    def note(self, step: Any) -> None:
        """A line of the metrics; step is a dataclass."""
        if self._folder is None:
            return
        with open(self._folder / METRICS_FILE, self._mode, encoding="utf-8") as metrics:
            metrics.write(json.dumps(asdict(step)) + "\n")
        self._mode = "a"


def _check_writable(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise CheckpointError(f"{folder} is not empty; name another folder, or ask for overwrite")
    check_replaceable(folder / ADAPTER_FOLDER, overwrite)


@contextmanager
def run_folder(model: nn.Module, folder: Path | None, overwrite: bool) -> Iterator[RunFolder]:
    """A run goes inside. When it ends, by an error too, the adapter is saved, unless it is what diverged.

    Nothing that was there is touched before the first finite loss; a folder that nothing was written to is removed.
    """
    if folder is None:
        yield RunFolder(model, None)
        return
    _check_writable(folder, overwrite)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        run = RunFolder(model, folder)
        try:
            yield run
        except NotFiniteError as error:
            if not run.saved:
                raise
            where = folder / ADAPTER_FOLDER
            raise NotFiniteError(f"{error}; {where} holds an adapter that gave a finite loss") from error
        except BaseException:
            if run.saved:
                run.save()
            raise
        run.save()
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
