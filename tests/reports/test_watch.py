"""Tests of a page that is kept up to date."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from qlora_lite.errors import CheckpointError, Stopped
from qlora_lite.progress.work import progress_shown
from qlora_lite.reports.watch import RELOAD_SECONDS, WRITE_SECONDS, watch_report
from qlora_lite.system import locked

Make = Callable[..., Path]
REFRESH = f'<meta http-equiv="refresh" content="{RELOAD_SECONDS}">'


def test_the_page_follows_a_run_to_its_end(make_run: Make, tmp_path: Path) -> None:
    folder, page, seen = make_run(steps=20), tmp_path / "page.html", []
    with ExitStack() as stack:
        stack.enter_context(locked(folder / ".run.lock"))
        os.utime(folder / "metrics.jsonl")  # as if it were written now

        def wait(seconds: float) -> None:
            seen.append((seconds, REFRESH in page.read_text(), ">running<" in page.read_text()))
            if len(seen) == 2:
                stack.close()  # the run ends

        runs = watch_report(page, [folder], wait)
    assert seen == [(WRITE_SECONDS, True, True)] * 2
    assert not runs[0].is_running and REFRESH not in page.read_text() and ">finished<" in page.read_text()


@pytest.mark.parametrize("error", [Stopped(signal.SIGINT, "stopped"), KeyboardInterrupt()])
def test_the_last_page_does_not_reload_itself(make_run: Make, tmp_path: Path, error: BaseException) -> None:
    folder, page = make_run(steps=20), tmp_path / "page.html"

    def wait(seconds: float) -> None:
        raise error

    with locked(folder / ".run.lock"), pytest.raises(type(error)):
        watch_report(page, [folder], wait)
    assert REFRESH not in page.read_text() and ">running<" in page.read_text()


def test_a_run_that_has_not_begun_is_waited_for(
    make_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, made = tmp_path / "run", []
    with progress_shown():
        runs = watch_report(tmp_path / "page.html", [folder], lambda seconds: made.append(make_run()))
    assert runs[0].last_step == 30
    assert capsys.readouterr().err == f"waiting for a run in {folder}; Ctrl-C ends this\n"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(CheckpointError, match="is not the folder of a run"):
        watch_report(tmp_path / "page.html", [tmp_path / "other"], lambda seconds: pytest.fail("waited"))
