"""Tests of the progress of long work: bars on a terminal, one line elsewhere, nothing unless it is asked for."""

from __future__ import annotations

import functools
import io
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from qlora_lite.progress import work as progress
from qlora_lite.progress.work import BYTES, Work, progress_shown, tell, working


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Terminal]:
    """Makes a terminal of stderr, on which work has a bar at once."""
    return functools.partial(_made_terminal, monkeypatch)


def _made_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setattr(progress, "BAR_AFTER", 0.0)
    return screen


def test_amounts() -> None:
    assert Work("w", 64, "prompts", done=1).amount() == "1/64 prompts"
    assert Work("w", None, "records", done=1200).amount() == "1,200 records"
    assert Work("w", 538 << 20, BYTES, done=100 << 20).amount() == "100 of 538 MiB"
    assert Work("w", None, BYTES, done=3 << 20).amount() == "3 MiB"
    assert Work("w", 3).amount() == "0/3"


def test_nothing_is_shown_unless_asked_for(terminal: Callable[[], Terminal]) -> None:
    screen = terminal()
    with working("loading", 2) as work:
        work.advance()
        tell("a line")
    assert work.done == 1 and screen.getvalue() == ""
    with progress_shown(), progress_shown(False), working("loading", 2) as work:
        work.advance()
        tell("a line")
    assert screen.getvalue() == ""


def test_bars_share_one_display_and_vanish(terminal: Callable[[], Terminal]) -> None:
    screen = terminal()
    with progress_shown():
        with progress_shown(), working("training", 4) as outer:
            outer.reach(1, "loss 1.5")
            with working("evaluating", None, "batches") as inner:
                inner.advance()
                time.sleep(0.15)  # it is drawn ten times a second
            tell("[between] two bars")
        tell("after both")
    text = screen.getvalue()
    assert outer.has_bar and "training" in text and "1/4" in text and "loss 1.5" in text and "1 batches" in text
    assert "[between] two bars" in text and text.endswith("\x1b[?25h\rafter both\n"), "the cursor or a bar was left"


def test_figures_give_way_on_a_narrow_terminal_and_the_time_left_does_not(
    terminal: Callable[[], Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = terminal()
    monkeypatch.setenv("COLUMNS", "80")
    figures = "loss 2.3456  lr 2.0e-04  norm 1.234  1,234 tokens/s  peak 1,234 MiB, and no more"
    with progress_shown(), working("training", 4000) as work:
        for done in (1200, 1201, 1202):
            work.reach(done, figures)
            time.sleep(0.06)
        display = work.display
        assert isinstance(display, progress._Bars) and display._shown is not None
        display._shown.refresh()
    lines = [line for line in re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", screen.getvalue()).splitlines() if "loss" in line]
    assert re.search(r"1,202/4,000 \d\d:\d\d loss 2", lines[-1]), lines[-1]
    assert lines[-1].endswith("…") and len(lines[-1]) <= 80


def test_a_dumb_terminal_has_no_bars(terminal: Callable[[], Terminal], monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal()
    monkeypatch.setenv("TERM", "dumb")
    with progress_shown(), working("loading", 2) as work:
        work.advance()
        time.sleep(0.15)
    assert not work.has_bar and screen.getvalue() == ""


def test_the_display_ends_with_work_that_failed(terminal: Callable[[], Terminal]) -> None:
    screen = terminal()

    def batches() -> Iterator[int]:
        with working("evaluating", 2) as work:
            yield 1
            work.advance()

    left = batches()
    with pytest.raises(RuntimeError), progress_shown():
        next(left)  # as a generator whose caller fails, and that is kept by the traceback
        raise RuntimeError
    assert screen.getvalue().endswith("\x1b[?25h\r\x1b[1A\x1b[2K"), "the cursor is hidden, or the bar was left"
    left.close()


def test_short_work_has_no_bar(terminal: Callable[[], Terminal], monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal()
    monkeypatch.setattr(progress, "BAR_AFTER", 0.5)
    with progress_shown(), working("loading", 2) as work:
        work.advance()
    assert "loading" not in screen.getvalue()


def test_what_is_printed_meanwhile_stays_on_a_redirected_stdout(
    terminal: Callable[[], Terminal], capsys: pytest.CaptureFixture[str]
) -> None:
    screen = terminal()
    with progress_shown(), working("loading", 2):
        sys.stdout.write('{"a": 1}\n')
    assert capsys.readouterr().out == '{"a": 1}\n' and "{" not in screen.getvalue()


def test_one_line_elsewhere_and_only_for_long_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress_shown(), working("loading", 4, "tensors") as work:
        work.advance()
        assert not work.has_bar
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "LINE_AFTER", 0.0)
    with progress_shown():
        with working("loading", 4, "tensors") as work:
            for _ in range(4):
                work.advance()
        with working("training", 4, has_line=False) as work:
            work.advance()
        with working("predicting"):
            pass
        with suppress(ValueError), working("failing"):
            raise ValueError
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["loading: 1/4 tensors after 0 seconds", "predicting: 0 seconds"]
    assert captured.out == ""


def test_one_of_several_processes_shows_its_progress(
    terminal: Callable[[], Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = terminal()
    monkeypatch.setenv("RANK", "1")
    with progress_shown(), working("loading", 2):
        tell("a line")
    assert screen.getvalue() == ""
