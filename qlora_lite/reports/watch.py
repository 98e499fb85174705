"""Keeps the page of runs up to date while one of them goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from qlora_lite.errors import Stopped
from qlora_lite.progress.work import tell
from qlora_lite.reports.history import RunHistory, is_before_run, read_history
from qlora_lite.reports.page import check_report_path, write_report
from qlora_lite.signals import uninterrupted

WRITE_SECONDS, RELOAD_SECONDS = 3, 5


def watch_report(
    path: str | Path, folders: Sequence[str | Path], wait: Callable[[float], None] = time.sleep
) -> list[RunHistory]:
    """Writes the page again every few seconds until no run is at work; returns the histories as they are then.

    The page reloads itself meanwhile. However this ends, the last page that is written does not. Folders that do not
    exist or are empty are waited for. Raises the errors of `read_history` and `write_report`.
    """
    check_report_path(path)
    runs: list[RunHistory] = []
    _wait_for(folders, wait)
    try:
        while True:
            runs = [read_history(folder) for folder in folders]
            if not any(run.is_running for run in runs):
                break
            write_report(path, runs, RELOAD_SECONDS)
            wait(WRITE_SECONDS)
    except (Stopped, KeyboardInterrupt):
        if runs:
            with uninterrupted():
                write_report(path, runs)
        raise
    write_report(path, runs)
    return runs


def _wait_for(folders: Sequence[str | Path], wait: Callable[[float], None]) -> None:
    missing = [folder for folder in folders if is_before_run(folder)]
    if missing:
        tell(f"waiting for a run in {', '.join(map(str, missing))}; Ctrl-C ends this")
    while any(is_before_run(folder) for folder in missing):
        wait(WRITE_SECONDS)
