"""The matrix of adapters between peft and us: its cases can fail, and only known refusals are refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lite import LoraConfig
from qlora_lite.errors import CheckpointError, TargetError

PROFILING = Path(__file__).resolve().parent.parent / "profiling"


@pytest.fixture
def interop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(PROFILING))
    import interop_matrix

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the script: two wait for each other longer than they compute on models this small
    yield interop_matrix
    torch.set_num_threads(threads)


@pytest.mark.parametrize("disturb", [None, "value", "alpha"])
def test_a_case_passes_and_fails_when_one_value_or_alpha_is_another(
    interop: Any, tmp_path: Path, disturb: str | None
) -> None:
    workshop = interop.Workshop(tmp_path)
    subject = interop.Subject("llama", "lora", "patterns", "none")
    found = list(interop.results(workshop, subject, disturb))
    assert [result.direction for result in found] == ["from_peft", "to_peft", "bf16", "merge", "files"]
    assert {result.status for result in found} == ({"passed"} if disturb is None else {"failed"}), found


def test_refusals_are_known_by_their_sentence_and_subject(interop: Any) -> None:
    from interop_checks import Refused, asked_of_us

    def refuse(error: Exception) -> Any:
        def call() -> None:
            raise error

        return call

    start = TargetError("init 'pissa' is for linear layers; wte is an embedding: leave it out")
    with pytest.raises(Refused, match="is for linear layers"):
        asked_of_us(interop.Subject("gpt2", "pissa", "embedding", "none"), refuse(start))
    with pytest.raises(TargetError):
        asked_of_us(interop.Subject("gpt2", "pissa", "attention", "none"), refuse(start))
    subject = interop.Subject("llama", "lora", "attention", "none")
    with pytest.raises(CheckpointError):
        asked_of_us(subject, refuse(CheckpointError("a.json sets lora_bias, which this version cannot honour")))
    with pytest.raises(KeyError):
        asked_of_us(subject, refuse(KeyError("lora_A")))


def test_an_option_that_there_is_no_field_for_is_not_built(interop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = [field for field in dataclasses.fields(LoraConfig) if field.name != "rank_pattern"]
    monkeypatch.setattr(dataclasses, "fields", lambda config: fields)
    subject = interop.Subject("llama", "lora", "patterns", "none")
    assert subject.not_built() == "not built yet: LoraConfig has no rank_pattern"
    assert dataclasses.replace(subject, targets="attention").not_built() is None


def test_every_combination_is_there_once(interop: Any) -> None:
    everything = list(interop.subjects())
    assert len(set(everything)) == len(everything)
    assert {subject.targets for subject in everything if subject.family == "mixtral"} >= {"stacks", "whole", "tokens"}
    assert sum(len(subject.directions()) for subject in everything) > 5000
    for family, variant in (("gpt2", "dora"), ("opt", "orthogonal")):
        chosen = [s for s in everything if (s.family, s.variant, s.base) == (family, variant, "nf4")]
        assert {subject.targets for subject in chosen} == set(interop.target_options(interop.FAMILIES[family]))


def test_differences_are_relative_and_never_pass_for_what_is_not_finite(interop: Any) -> None:
    from interop_checks import Different, check_equal, difference

    one = torch.tensor([1.0, -4.0])
    assert difference(one + torch.tensor([0.0, 0.4]), one) == pytest.approx(0.1)
    assert difference(one[:1], one) == float("inf")
    with pytest.raises(Different, match=r"logits differ by inf"):
        check_equal("logits", torch.tensor([float("nan"), -4.0]), one, 1e-5)
