"""Tests of peft_matrix.py: one check of each setting, some actions, and that cases can fail. Interop runs all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from qlora_lite.integrations.peft_linear import PackedLinear

# Some settings, with another check and another base each time.
BASES = ("nf4", "fp4", "int8")
CHECKS = ("output", "merge", "unload", "files", "state_dict", "sides")
SETTINGS = (
    *("plain", "all_linear", "rslora", "dora", "patterns", "layers", "modules_to_save", "bias_all", "lora_bias"),
    *("tokens", "packed_head", "packed_embedding", "both_tied", "stacks", "stacks_in_out", "one_stack", "v4_experts"),
)
ACTIONS = (
    *("stacks_of_experts", "several_active", "add_and_delete", "later_all_linear", "mixed_batch", "merge_some"),
    *("weighted_is_refused", "merge_of_a_bias", "dtypes", "dropout", "conv1d"),
)


@pytest.fixture(scope="module")
def peft_matrix(import_script: Callable[[str], Any]) -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the script: on small models two threads mostly wait for each other
    yield import_script("tests/interop/peft_matrix.py")
    torch.set_num_threads(threads)


def test_every_case_is_there_once(peft_matrix: Any) -> None:
    everything = list(peft_matrix.cases())
    assert len(set(everything)) == len(everything) > 300
    assert set(peft_matrix.SETTINGS) > set(SETTINGS) and set(peft_matrix.ACTIONS) > set(ACTIONS)
    assert tuple(peft_matrix.CHECKS) == CHECKS and BASES == peft_matrix.BASES


@pytest.mark.parametrize("number", range(len(SETTINGS)), ids=lambda number: SETTINGS[number])
def test_settings(peft_matrix: Any, number: int) -> None:
    peft_matrix.Case(BASES[number % 3], SETTINGS[number], CHECKS[number % 6]).run()


@pytest.mark.parametrize("number", range(len(ACTIONS)), ids=lambda number: ACTIONS[number])
def test_actions(peft_matrix: Any, number: int) -> None:
    peft_matrix.Case(BASES[number % 3], ACTIONS[number], "action").run()


def test_cases_fail_where_something_is_wrong(peft_matrix: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str, check: str) -> None:
        with pytest.raises(AssertionError):
            peft_matrix.Case("nf4", name, check).run()

    with monkeypatch.context() as patch:
        patch.setattr(PackedLinear, "merge", lambda self, *args, **options: None)
        fails("plain", "merge")
    with monkeypatch.context() as patch:
        patch.setattr(PackedLinear, "output_norms", lambda self, adapter: torch.ones(self.out_features))
        fails("dora", "output")
    right = PackedLinear._product
    monkeypatch.setattr(PackedLinear, "_product", lambda self, x, adapter: right(self, x * (1 + 1e-4), adapter))
    fails("plain", "output")
    fails("several_active", "action")
