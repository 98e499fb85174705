"""A sample of the cases of bad_arguments.py, which knows every option of every command."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture(scope="module")
def corpus(import_script: Callable[[str], Any]) -> Any:
    return import_script("tests/reliability/bad_arguments.py")


@pytest.fixture
def paths(corpus: Any, make_tiny_model: Callable[..., Path], memory_path: Path) -> Any:
    return corpus.CasePaths(memory_path / "paths", lambda folder: make_tiny_model(folder, hidden=32))


def test_wrong_arguments_are_refused_by_one_line_and_nothing_is_written(corpus: Any, paths: Any) -> None:
    every = corpus.cases(paths)
    found = {(case.command, case.what.partition(":")[0]) for case in every}
    options = {(name, param.name) for name, params in corpus.parameters().items() for param, _ in params}
    assert options <= found and len(options) > 70
    # Each option once, and a few of every kind of path.
    chosen = list({(case.command, case.what.partition(":")[0]): case for case in every}.values()) + every[::20]
    assert [wrong for case in chosen if (wrong := corpus.run_argument_case(paths, case)) is not None] == []


def test_right_arguments_run(corpus: Any, paths: Any) -> None:
    """Without the wrong argument, each command succeeds: the refusals are of that argument alone."""
    for command in ("data", "train", "merge", "quantize", "inspect", "report", "env"):
        words = tuple(word.format(**paths.paths) for word in corpus.NEEDED[command])
        wrong = corpus.run_argument_case(paths, corpus.Case(command, words, 1, "right"))
        assert wrong is not None and "status 0" in wrong, wrong


def test_an_option_or_a_command_that_the_tables_lack_is_an_error(
    corpus: Any, paths: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"opts": ["--novelty"], "required": False, "multiple": False, "is_flag": False, "default": "none"}
    param = SimpleNamespace(name="novelty", param_type_name="option", **facts)
    assert set(corpus.parameters()) == {command.callback.__name__ for command in corpus.app.registered_commands}
    for found, name in (({"quantize": [(param, str)]}, "novelty"), ({"invent": []}, "invent")):
        monkeypatch.setattr(corpus, "parameters", lambda found=found: found)
        with pytest.raises(KeyError, match=name):
            corpus.cases(paths)


def test_debug_shows_the_traceback_before_the_line(corpus: Any, paths: Any) -> None:
    model = str(paths.paths["model"])
    for words, status in (
        (["profile", "--model", model, "--format", "nf5"], 2),
        (["inspect", model + "x"], 1),
        (["x"], 2),
    ):
        quiet, loud = corpus.run_main(words), corpus.run_main(["--debug", *words])
        assert quiet[0] == loud[0] == status and "Traceback" in loud[1]
        assert quiet[1].count("\n") == 1 and loud[1].endswith(quiet[1])


def test_a_path_that_is_not_utf8_is_written_to_and_printed(
    corpus: Any, paths: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, out = paths.root / os.fsdecode(b"\xff"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(contextlib, "redirect_stdout", lambda to: contextlib.redirect_stderr(sys.stderr))
    monkeypatch.setattr(sys, "stdout", out)
    words = ["quantize", "--model", str(paths.paths["model"]), "--output", str(output)]
    assert corpus.run_main(words) == (0, "") and (output / "config.json").is_file()
    out.seek(0)
    assert out.read().endswith("\\udcff\n")
