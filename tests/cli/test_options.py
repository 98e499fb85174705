"""Tests of the options that several commands share."""

from __future__ import annotations

import json
import sys
import typing
from pathlib import Path
from typing import Annotated

import pytest
import typer

from qlora_lite.cli import options
from qlora_lite.cli.main import main
from qlora_lite.errors import ConfigError
from qlora_lite.quantization.config import QuantConfig


def test_names_and_numbers_stand_between_commas() -> None:
    assert options.listed(" norm, lm_head") == ["norm", "lm_head"] and options.listed("") == []
    assert options.listed_tokens("7,12") == [7, 12]
    with pytest.raises(ConfigError, match="--trainable-token-indices must be token ids separated by commas; got '7,x'"):
        options.listed_tokens("7,x")


def test_layers_are_named_in_a_list_or_by_an_expression() -> None:
    named = options.targets_named
    assert named("--target-modules", "all-linear") == "all-linear"
    assert named("--target-modules", "q_proj, layers.1.up_proj") == ["q_proj", "layers.1.up_proj"]
    assert named("--target-modules", r"re:.*layers\.[0-3]\.(q|k){1,2}_proj") == r".*layers\.[0-3]\.(q|k){1,2}_proj"
    with pytest.raises(ConfigError, match="--exclude-modules re: must be followed by a regular expression"):
        named("--exclude-modules", "re:")


@pytest.mark.parametrize(
    "words",
    [
        "train --data d --output o",
        "merge --adapter a --output o",
        "quantize --output o",
        "plan --memory 1GiB",
        "profile",
    ],
)
def test_modules_to_skip_reach_the_settings_of_packing(
    words: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(config: QuantConfig) -> None:
        raise ConfigError(f"skips {config.skip_modules}")

    monkeypatch.setattr(QuantConfig, "__post_init__", stop)
    for given, got in (([], "None"), (["--skip-modules", "experts, lm_head"], "('experts', 'lm_head')")):
        monkeypatch.setattr(sys, "argv", ["qlora-lite", *words.split(), "--model", str(tiny_folder), *given])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2 and capsys.readouterr().err == f"error: skips {got}\n"


def test_figures_are_for_a_person_or_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"files_written": ["a", "b"], "halved": None, "steps": 0}
    options.finish(figures, as_json=False)
    assert capsys.readouterr().out == "files written  a, b\nhalved         -\nsteps          0\n"
    options.finish(figures, as_json=True)
    assert json.loads(capsys.readouterr().out) == figures


def test_every_option_says_what_it_is_for() -> None:
    declared = {name: value for name, value in vars(options).items() if typing.get_origin(value) is Annotated}
    assert len(declared) > 10
    for name, value in declared.items():
        option = value.__metadata__[0]
        assert option.help and option.help.endswith("."), name
        assert typing.get_args(value)[0] is not None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--name", "a", "--name", "b"], "--name is given 2 times; give it once"),
        (["--many", "a", "--many", ""], "--many must not be empty"),
        ([""], "place must not be empty"),
    ],
)
def test_what_would_mean_something_else_than_it_says_is_refused(words: list[str], sentence: str) -> None:
    app = typer.Typer()
    seen: list[object] = []

    @app.command(cls=options.StrictCommand)
    def command(
        place: Annotated[str, typer.Argument()] = "here",
        name: str = "",
        many: Annotated[list[str] | None, typer.Option()] = None,
    ) -> None:
        seen.append((place, name, many))

    app(["there", "--many", "a", "--many", "b", "--name", "c"], standalone_mode=False)
    assert seen == [("there", "c", ["a", "b"])]
    with pytest.raises(Exception, match=sentence):
        app(words, standalone_mode=False)
    assert len(seen) == 1


def test_an_argument_of_several_words_has_no_empty_one() -> None:
    app = typer.Typer()
    seen: list[list[str]] = []

    @app.command(cls=options.StrictCommand)
    def command(places: Annotated[list[str], typer.Argument()]) -> None:
        seen.append(places)

    app(["here", "there"], standalone_mode=False)
    for words, sentence in ((["here", ""], "places must not be empty"), ([], "Missing")):
        with pytest.raises(Exception, match=sentence):
            app(words, standalone_mode=False)
    assert seen == [["here", "there"]]


def test_a_number_or_a_word() -> None:
    found = options.number_or_word
    assert found("--x", "none", "none", float) is None
    assert (found("--x", "0.5", "none", float), found("--x", "3", "all", int)) == (0.5, 3)
    with pytest.raises(ConfigError, match=r"--x must be a number, or all; got '1.5'"):
        found("--x", "1.5", "all", int)


def test_figures_are_rounded_for_a_reader_and_not_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"peak_bytes": 960648192, "bytes": 12, "perplexity_after": 1.3740500639731412, "left": None, "of": []}
    options.finish(figures, as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        "peak              916.1 MiB",
        "bytes             12",
        "perplexity after  1.3741",
        "left              -",
        "of                -",
    ]
    options.finish(figures, as_json=True)
    assert json.loads(capsys.readouterr().out) == figures
