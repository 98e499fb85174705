from __future__ import annotations

import typing

import pytest

from qlora_lite import cli_options
from qlora_lite.errors import ConfigError


def test_names_and_numbers_stand_between_commas() -> None:
    assert cli_options.listed(" norm, lm_head") == ["norm", "lm_head"] and cli_options.listed("") == []
    assert cli_options.listed_tokens("7,12") == [7, 12]
    with pytest.raises(ConfigError, match="--train-tokens must be token numbers with commas; got '7,x'"):
        cli_options.listed_tokens("7,x")


def test_every_option_says_what_it_is_for() -> None:
    options = {name: value for name, value in vars(cli_options).items() if name[0].isupper() and name != "Path"}
    assert len(options) > 10
    for name, value in options.items():
        if name not in ("Annotated", "Any"):
            (said,) = value.__metadata__
            assert (said.help and said.help.endswith(".")) or ":" in said.help, name
            assert typing.get_args(value)[0] is not None
