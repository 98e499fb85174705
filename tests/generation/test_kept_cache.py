"""Tests of KeptCache: the same greedy answers as without it in every family, and fewer tokens computed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from qlora_lite import LoraConfig, add_lora_
from qlora_lite.errors import Stopped
from qlora_lite.generation.answering import answer_prompt
from qlora_lite.generation.kept_cache import KeptCache
from qlora_lite.generation.prompts import Prompts
from qlora_lite.generation.settings import GenerationSettings
from qlora_lite.lora import lora_layers, merge_lora_, unmerge_lora_
from qlora_lite.signals import deferred_signals

NEW = 5
FIVE = GenerationSettings(max_new_tokens=NEW, temperature=0)
FIRST = [*range(5, 17)]
WINDOW = 8
SIZES = {"vocab_size": 105, "eos_token_id": None}
FULL = {
    "LlamaConfig": {},
    "Qwen3Config": {},
    "GPT2Config": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "BloomConfig": {},
    "GPTNeoXConfig": {},
    "MixtralConfig": {"sliding_window": None},
    "Gemma3TextConfig": {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
}
SLIDING = {
    "MistralConfig": {"sliding_window": WINDOW},
    "Gemma2Config": {"sliding_window": WINDOW},
    "Gemma3TextConfig": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
}
NOT_KEPT = {
    "MambaConfig": {"state_size": 8},
    "Lfm2Config": {"layer_types": ["conv", "full_attention"]},
    "RwkvConfig": {},
    "Phi3Config": {
        "original_max_position_embeddings": 8,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 8,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "factor": 4.0,
        },
    },
    "LlamaConfig": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
}


class Turns:
    """Prompts to one model and their answers; counts the tokens that its forward gets."""

    def __init__(self, model: Any, tokenizer: Any, kept: KeptCache | None) -> None:
        self._model, self._prompts, self._kept, self._count = model, Prompts(tokenizer), kept, 0
        model.register_forward_pre_hook(self._note, with_kwargs=True)
        self.written: list[int] = []

    def _note(self, module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._count += options["input_ids"].shape[1]

    def ask(self, prompt: Sequence[int], **options: Any) -> int:
        """Returns the number of tokens of the prompt that were computed; `written` has the answer."""
        self._count, generate = 0, self._model.generate

        def noted(**given: Any) -> Any:
            made = generate(**given)
            self.written = made.sequences[0, len(prompt) :].tolist()
            return made

        self._model.generate = noted
        try:
            answer = answer_prompt(self._model, self._prompts, prompt, FIVE, kept=self._kept, **options)
        finally:
            del self._model.generate
        return self._count - answer.tokens + 1


def asked(model: Any, tokenizer: Any, kept: KeptCache | None) -> tuple[list[int], list[list[int]]]:
    """The tokens computed of five prompts, and their answers."""
    turns, counts, answers = Turns(model, tokenizer, kept), list[int](), list[list[int]]()

    def ask(prompt: Sequence[int]) -> None:
        counts.append(turns.ask(prompt))
        answers.append(turns.written)

    ask(FIRST)
    longer = [*FIRST, *turns.written, 20, 21, 22]
    ask(longer)  # goes on where the first one ended
    ask(longer)  # asks again
    ask([*longer[:10], 30, 31, 32, 33])  # parts within the first prompt
    ask([40, 41, 42])  # another conversation
    return counts, answers


def compared(make: Callable[[], Any], tokenizer: Any) -> list[int]:
    """The tokens that are computed of each prompt with a kept cache, after a comparison of the answers."""
    alone, kept = asked(make(), tokenizer, None), asked(make(), tokenizer, KeptCache())
    assert alone[0] == [12, 20, 20, 14, 3]
    assert kept[1] == alone[1]
    return kept[0]


@pytest.mark.parametrize("family", FULL)
def test_only_what_is_new_is_computed(family: str, small_model: Callable[..., Any], tokenizer: Any) -> None:
    counts = compared(lambda: small_model(family, **{**SIZES, **FULL[family]}), tokenizer)
    assert counts == [12, 4, 1, 4, 3]  # of an answer the last token was not computed yet


@pytest.mark.parametrize("family", SLIDING)
def test_a_window_that_moved_on_serves_what_goes_on(
    family: str, small_model: Callable[..., Any], tokenizer: Any
) -> None:
    counts = compared(lambda: small_model(family, **{**SIZES, **SLIDING[family]}), tokenizer)
    assert counts == [12, 4, 20, 14, 3]


@pytest.mark.parametrize("family", NOT_KEPT)
def test_what_cannot_be_cut_is_computed_again(family: str, small_model: Callable[..., Any], tokenizer: Any) -> None:
    counts = compared(lambda: small_model(family, **{**SIZES, **NOT_KEPT[family]}), tokenizer)
    assert counts == [12, 20, 20, 14, 3]


def test_a_window_that_has_room_is_cut(small_model: Callable[..., Any], tokenizer: Any) -> None:
    turns = Turns(small_model("MistralConfig", **SIZES, sliding_window=WINDOW), tokenizer, KeptCache())
    assert turns.ask(FIRST[:2]) == 2  # 6 tokens are kept
    assert turns.ask([5, 9]) == 1
    assert turns.ask([5, 9, *turns.written[:3], 7, 8]) == 2  # cut by one token, and beyond the window
    assert turns.ask([5, 9, 10]) == 3


def test_weights_that_changed_drop_it(model: Any, tokenizer: Any) -> None:
    add_lora_(model, LoraConfig(rank=2, alpha=4))
    layer = next(iter(lora_layers(model).values()))
    turns = Turns(model, tokenizer, KeptCache())

    def optimize() -> None:
        with torch.no_grad():
            layer.lora_B.add_(1.0)

    def replace() -> None:
        layer.lora_A = torch.nn.Parameter(layer.lora_A.detach().clone())

    def disable() -> None:
        layer.adapter_enabled = not layer.adapter_enabled

    assert (turns.ask(FIRST), turns.ask(FIRST)) == (12, 1)
    changes = (optimize, replace, disable, lambda: merge_lora_(model), lambda: unmerge_lora_(model))
    for change in changes:
        change()
        assert (turns.ask(FIRST), turns.ask(FIRST)) == (12, 1), change
    model.to(torch.float64)
    assert turns.ask(FIRST) == 12


def test_an_interrupted_answer_keeps_what_is_valid(model: Any, tokenizer: Any) -> None:
    kept, ends = KeptCache(), iter([False, True])
    turns = Turns(model, tokenizer, kept)
    assert turns.ask(FIRST, interrupted=lambda: next(ends)) == 12 and kept.tokens == len(FIRST) + 1
    alone = Turns(model, tokenizer, None)
    longer = [*FIRST, *turns.written, 20]
    assert len(turns.written) == 2 and turns.ask(longer) == 2
    alone.ask(longer)
    assert turns.written == alone.written


def test_nothing_is_kept_of_an_answer_that_a_signal_ended(model: Any, tokenizer: Any) -> None:
    kept = KeptCache()
    turns = Turns(model, tokenizer, kept)
    turns.ask(FIRST)
    with pytest.raises(Stopped), deferred_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        turns.ask(FIRST)
    assert kept.tokens == 0
