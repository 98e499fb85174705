"""Tests of the names that are proposed for a wrong one."""

from __future__ import annotations

import pytest

from qlora_lite.cli.configuration.other_names import OTHER_NAMES, nearest_name
from qlora_lite.cli.configuration.schema import options_of
from qlora_lite.cli.train import train


def test_names_of_other_programs_lead_to_options() -> None:
    options = options_of(train)
    assert set(OTHER_NAMES.values()) - {"track"} <= set(options) and not set(OTHER_NAMES) & set(options)
    assert all(nearest_name(name, options) == meant for name, meant in OTHER_NAMES.items() if meant in options)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("learnig_rate", "learning_rate"),
        ("learning-rate", "learning_rate"),
        ("Learning Rate", "learning_rate"),
        ("--epochs", "epochs"),
        ("modle", "model"),
        ("xyzzy", None),
    ],
)
def test_the_nearest_name(wrong: str, meant: str | None) -> None:
    assert nearest_name(wrong, options_of(train)) == meant
