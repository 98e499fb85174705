from __future__ import annotations

import typing

from qlora_lite import cli_options


def test_every_option_says_what_it_is_for() -> None:
    options = {name: value for name, value in vars(cli_options).items() if name[0].isupper() and name != "Path"}
    assert len(options) > 10
    for name, value in options.items():
        if name != "Annotated":
            (said,) = value.__metadata__
            assert (said.help and said.help.endswith(".")) or ":" in said.help, name
            assert typing.get_args(value)[0] is not None
