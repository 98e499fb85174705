"""Tests of a file of answers: its order, its batches, and what is left of a run that ended early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_lite import LoraConfig, add_lora_
from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.generation import answer_file
from qlora_lite.generation.answer_file import batches_by_length, write_answers
from qlora_lite.generation.answer_journal import journal_path
from qlora_lite.generation.answering import answer_batch, answer_prompt
from qlora_lite.generation.prompts import Prompt, Prompts
from qlora_lite.generation.record_prompts import PromptSet
from qlora_lite.generation.settings import GenerationSettings
from qlora_lite.lora import lora_layers

SIX = GenerationSettings(max_new_tokens=6)
TEXTS = ("a", "what is it?", "one two three", "xyz", "b c")


@pytest.fixture
def prompts(tokenizer: Any) -> Prompts:
    return Prompts(tokenizer)


@pytest.fixture
def asked(prompts: Prompts) -> PromptSet:
    return PromptSet([Prompt(prompts.of_text(text), text, text[:1] if "?" in text else None) for text in TEXTS])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_batches_are_of_about_one_length(asked: PromptSet) -> None:
    assert batches_by_length(asked.prompts, 2) == [[2, 1], [3, 4], [0]]


def test_answers_stand_in_the_order_of_the_prompts(
    model: Any, prompts: Prompts, asked: PromptSet, tmp_path: Path
) -> None:
    shown: list[int] = []
    done = write_answers(model, prompts, asked, tmp_path / "o" / "a.jsonl", SIX, batch_size=2, on_answers=shown.append)
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["a.jsonl"]
    alone = [answer_prompt(model, prompts, prompt.tokens, SIX) for prompt in asked.prompts]
    assert lines(tmp_path / "o" / "a.jsonl") == [
        {"prompt": prompt.shown, "answer": one.text, "finish_reason": one.finish_reason, "tokens": one.tokens}
        | ({} if prompt.expected is None else {"expected": "w"})
        for prompt, one in zip(asked.prompts, alone, strict=True)
    ]
    assert (done.prompts, done.resumed, done.new_tokens) == (5, 0, sum(one.tokens for one in alone))
    assert shown == [2, 4, 5]
    with pytest.raises(CheckpointError, match=r"a.jsonl exists; name another file, or ask for overwrite"):
        write_answers(model, prompts, asked, tmp_path / "o" / "a.jsonl", SIX)


def test_base_and_adapter_stand_side_by_side(model: Any, prompts: Prompts, asked: PromptSet, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compare needs a model with an adapter in use"):
        write_answers(model, prompts, asked, tmp_path / "a.jsonl", SIX, compare=True)
    write_answers(model, prompts, asked, tmp_path / "base.jsonl", SIX)
    add_lora_(model, LoraConfig(rank=2, alpha=64, target_modules=["down_proj"]))
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(std=2.0)
    write_answers(model, prompts, asked, tmp_path / "a.jsonl", SIX, compare=True)
    write_answers(model, prompts, asked, tmp_path / "adapter.jsonl", SIX)
    compared, base, adapter = (lines(tmp_path / f"{name}.jsonl") for name in ("a", "base", "adapter"))
    assert [one["base_answer"] for one in compared] == [one["answer"] for one in base]
    assert [one["answer"] for one in compared] == [one["answer"] for one in adapter] != [one["answer"] for one in base]


@pytest.mark.parametrize("batches_done", [0, 1, 2])
def test_a_run_that_ended_early_goes_on(
    model: Any,
    prompts: Prompts,
    asked: PromptSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batches_done: int,
) -> None:
    """Drawn answers too: those of a batch depend on its number, not on what was drawn before."""
    drawn = GenerationSettings(max_new_tokens=6, temperature=2.0, seed=3)
    write_answers(model, prompts, asked, tmp_path / "whole.jsonl", drawn, batch_size=2)
    calls = 0

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > batches_done:
            raise KeyboardInterrupt
        return answer_batch(*arguments)

    monkeypatch.setattr(answer_file, "answer_batch", failing)
    output = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write_answers(model, prompts, asked, output, drawn, batch_size=2)
    assert not output.exists() and journal_path(output).exists()
    for changed in ({"batch_size": 3}, {"settings": SIX}, {"asked": PromptSet(asked.prompts[:4])}):
        options: dict[str, Any] = {"settings": drawn, "batch_size": 2, "asked": asked, **changed}
        with pytest.raises(CheckpointError, match="holds unfinished answers of another run: "):
            write_answers(model, prompts, options.pop("asked"), output, options.pop("settings"), **options)
    monkeypatch.setattr(answer_file, "answer_batch", answer_batch)
    done = write_answers(model, prompts, asked, output, drawn, batch_size=2)
    assert done.resumed == 2 * batches_done
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_another_adapter_is_another_run(
    model: Any, prompts: Prompts, asked: PromptSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_file, "_finish", lambda *_: pytest.fail("stopped before the end"))
    with pytest.raises(pytest.fail.Exception):
        write_answers(model, prompts, asked, tmp_path / "a.jsonl", SIX)
    monkeypatch.undo()
    add_lora_(model, LoraConfig(rank=2, alpha=4, target_modules=["down_proj"]))
    with pytest.raises(
        CheckpointError, match="of another run: the adapter differs; restore these, or begin anew with ov"
    ):
        write_answers(model, prompts, asked, tmp_path / "a.jsonl", SIX)
    assert write_answers(model, prompts, asked, tmp_path / "a.jsonl", SIX, overwrite=True).resumed == 0


def test_a_kill_after_the_output_was_written_leaves_nothing_to_do(
    model: Any, prompts: Prompts, asked: PromptSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "a.jsonl"
    monkeypatch.setattr(Path, "unlink", lambda path, **_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        write_answers(model, prompts, asked, output, SIX)
    monkeypatch.undo()
    before = output.read_bytes()
    assert write_answers(model, prompts, asked, output, SIX).resumed == 5
    assert output.read_bytes() == before and not journal_path(output).exists()
