"""Tests of the classes of peft's options: each is read, ignored or refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from qlora_lite.lora.peft.options import IGNORED_OPTIONS, LORA_CONFIG_FIELDS, base_changing_init, refused_options
from qlora_lite.lora.variants import PEFT_OPTIONS

# Options that change what is computed, or that come with tensors of their own. A newly supported one leaves this set.
REFUSED_OPTIONS = {
    "alora_invocation_tokens",
    "arrow_config",
    "enable_lora",  # peft 0.2: A and B for some thirds of a joined projection only
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
}
# Of peft 0.2 and 0.3, gone since.
FORMER_OPTIONS = {"enable_lora", "merge_weights"}


def test_every_option_of_the_installed_peft_is_in_one_class() -> None:
    import peft

    theirs = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    classes = (set(LORA_CONFIG_FIELDS), set(IGNORED_OPTIONS), REFUSED_OPTIONS, set(PEFT_OPTIONS))
    assert theirs | FORMER_OPTIONS == set.union(*classes)
    assert sum(map(len, classes)) == len(set.union(*classes))


def test_defaults_of_the_installed_peft_are_accepted() -> None:
    import peft

    assert refused_options(peft.LoraConfig().to_dict()) == []


def test_what_is_set_and_changes_what_is_computed_is_named() -> None:
    config: dict[str, Any] = {key: [1] for key in REFUSED_OPTIONS} | {"from_the_future": {"a": 1}, "r": 3}
    assert refused_options(config) == sorted([*REFUSED_OPTIONS, "from_the_future"])
    unset = dict.fromkeys(REFUSED_OPTIONS, None) | {"bias": "none", "from_the_future": []}
    assert refused_options(unset) == []


@pytest.mark.parametrize("start", ["pissa_niter_4", "OLoRA", "corda", "loftq", "lora_ga"])
def test_starts_that_change_the_base_are_refused(start: str) -> None:
    assert base_changing_init({"init_lora_weights": start}) == start
    assert refused_options({"init_lora_weights": start}) == [f"init_lora_weights={start!r}"]
    assert base_changing_init({"init_lora_weights": True}) is base_changing_init({"init_lora_weights": "eva"}) is None
