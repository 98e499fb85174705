"""Tests of matrix.py: its cases can fail, and only known refusals count as refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lite import LoraConfig
from qlora_lite.errors import CheckpointError, TargetError


@pytest.fixture
def matrix(import_script: Callable[[str], Any]) -> Iterator[Any]:
    script = import_script("tests/interop/matrix.py")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the script: on small models two threads mostly wait for each other
    yield script
    torch.set_num_threads(threads)


@pytest.fixture
def checks(import_script: Callable[[str], Any]) -> Any:
    return import_script("tests/interop/checks.py")


@pytest.mark.parametrize("disturb", [None, "value", "alpha"])
def test_a_case_passes_and_fails_when_one_value_or_alpha_is_changed(
    matrix: Any, tmp_path: Path, disturb: str | None
) -> None:
    workshop = matrix.Workshop(tmp_path)
    subject = matrix.Subject("llama", "lora", "patterns", "none")
    found = list(matrix.results(workshop, subject, disturb))
    assert [result.direction for result in found] == ["from_peft", "to_peft", "bf16", "merge", "files"]
    assert {result.status for result in found} == ({"passed"} if disturb is None else {"failed"}), found


def test_refusals_are_known_by_their_sentence_and_subject(matrix: Any, checks: Any) -> None:
    def refuse(error: Exception) -> Any:
        def call() -> None:
            raise error

        return call

    refusal = TargetError("init_lora_weights 'pissa' is for linear layers; wte is an embedding: leave it out")
    with pytest.raises(checks.Refused, match="is for linear layers"):
        checks.asked_of_us(matrix.Subject("gpt2", "pissa", "embedding", "none"), refuse(refusal))
    with pytest.raises(TargetError):
        checks.asked_of_us(matrix.Subject("gpt2", "pissa", "attention", "none"), refuse(refusal))
    subject = matrix.Subject("llama", "lora", "attention", "none")
    with pytest.raises(CheckpointError):
        checks.asked_of_us(
            subject, refuse(CheckpointError("a.json sets lora_bias, which this version does not support"))
        )
    with pytest.raises(KeyError):
        checks.asked_of_us(subject, refuse(KeyError("lora_A")))


def test_an_option_that_loraconfig_lacks_is_not_built(matrix: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = [field for field in dataclasses.fields(LoraConfig) if field.name != "rank_pattern"]
    monkeypatch.setattr(dataclasses, "fields", lambda config: fields)
    subject = matrix.Subject("llama", "lora", "patterns", "none")
    assert subject.not_built() == "not built yet: LoraConfig has no rank_pattern"
    assert dataclasses.replace(subject, targets="attention").not_built() is None


def test_every_combination_is_there_once(matrix: Any) -> None:
    everything = list(matrix.subjects())
    assert len(set(everything)) == len(everything)
    assert {subject.targets for subject in everything if subject.family == "mixtral"} >= {"stacks", "whole", "tokens"}
    assert sum(len(subject.directions()) for subject in everything) > 5000
    for family, variant in (("gpt2", "dora"), ("opt", "orthogonal")):
        chosen = [s for s in everything if (s.family, s.variant, s.base) == (family, variant, "nf4")]
        assert {subject.targets for subject in chosen} == set(matrix.target_options(matrix.FAMILIES[family]))


def test_differences_are_relative_and_values_not_finite_never_pass(checks: Any) -> None:
    one = torch.tensor([1.0, -4.0])
    assert checks.difference(one + torch.tensor([0.0, 0.4]), one) == pytest.approx(0.1)
    assert checks.difference(one[:1], one) == float("inf")
    with pytest.raises(checks.Different, match=r"logits differ by inf"):
        checks.check_equal("logits", torch.tensor([float("nan"), -4.0]), one, 1e-5)
