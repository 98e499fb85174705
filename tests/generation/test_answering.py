"""Tests of answers: those of transformers' generate, in whole characters, batched, drawn and interrupted."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_lite.errors import ConfigError, Stopped
from qlora_lite.generation.answering import INCOMPLETE, TextPieces, answer_batch, answer_prompt, positions_left
from qlora_lite.generation.prompts import Prompts
from qlora_lite.generation.settings import GenerationSettings
from qlora_lite.signals import deferred_signals

TEN = GenerationSettings(max_new_tokens=10)
TEXTS = ("a", "what is it?", "one two three four five", "xyz")


@pytest.fixture
def prompts(tokenizer: Any) -> Prompts:
    return Prompts(tokenizer)


def test_tokens_are_those_of_generate(model: Any, prompts: Prompts) -> None:
    tokens, pieces = prompts.of_text("what is it?"), list[str]()
    answer = answer_prompt(model, prompts, tokens, TEN, pieces.append)
    expected = model.generate(torch.tensor([tokens]), max_new_tokens=10, do_sample=False)[0, len(tokens) :]
    assert answer.text == prompts.tokenizer.decode(expected, clean_up_tokenization_spaces=False) == "".join(pieces)
    assert (answer.tokens, answer.finish_reason) == (10, "length") and len(pieces) > 1


def test_a_stop_token_ends_the_answer_and_is_left_out(model: Any, prompts: Prompts) -> None:
    tokens = prompts.of_text("what is it?")
    written = model.generate(torch.tensor([tokens]), max_new_tokens=10, do_sample=False)[0, len(tokens) :].tolist()
    model.generation_config.eos_token_id = written[3]
    first = written.index(written[3])
    answer = answer_prompt(model, prompts, tokens, TEN)
    assert (answer.tokens, answer.finish_reason) == (first + 1, "stop")
    assert answer.text == prompts.tokenizer.decode(written[:first], clean_up_tokenization_spaces=False)
    assert model.generation_config.eos_token_id == written[3] and model.generation_config.max_new_tokens is None


def test_batched_answers_are_those_of_one_by_one(model: Any, prompts: Prompts) -> None:
    rows = [prompts.of_text(text) for text in TEXTS]
    model.generation_config.eos_token_id = model.generate(torch.tensor([rows[1]]), max_new_tokens=4)[0, -1].item()
    alone = [answer_prompt(model, prompts, row, TEN) for row in rows]
    assert answer_batch(model, prompts, rows, TEN) == alone
    assert {one.finish_reason for one in alone} == {"stop", "length"}


def test_draws_depend_on_the_seed_and_the_number_alone(model: Any, prompts: Prompts) -> None:
    drawn = GenerationSettings(max_new_tokens=10, temperature=2.0, seed=5)
    rows = [prompts.of_text(text) for text in TEXTS]
    before = torch.get_rng_state()
    one = answer_batch(model, prompts, rows, drawn, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert answer_batch(model, prompts, rows, drawn, 3) == one != answer_batch(model, prompts, rows, drawn, 4)


def test_an_answer_ends_where_it_is_interrupted(model: Any, prompts: Prompts) -> None:
    asked = iter([False, False, True])
    answer = answer_prompt(model, prompts, prompts.of_text("a"), TEN, interrupted=lambda: next(asked))
    assert (answer.tokens, answer.finish_reason) == (3, "interrupted") and answer.text


@pytest.mark.parametrize("batched", [True, False])
def test_a_signal_ends_it_at_the_next_token(model: Any, prompts: Prompts, batched: bool) -> None:
    row = prompts.of_text("a")
    with pytest.raises(Stopped), deferred_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        if batched:
            answer_batch(model, prompts, [row], TEN)
        else:
            answer_prompt(model, prompts, row, TEN)


def test_only_causal_language_models_answer(small_model: Callable[..., Any], prompts: Prompts) -> None:
    import transformers

    encoder = transformers.BertForMaskedLM(
        transformers.BertConfig(vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(ConfigError, match="a BertForMaskedLM is made for masked-lm; only causal language models write"):
        answer_prompt(encoder, prompts, [5], TEN)


def test_positions_left(model: Any) -> None:
    model.config.max_position_embeddings = 20
    assert positions_left(model, [5] * 7, TEN) == 3 and positions_left(model, [5] * 12, TEN) == -2


def test_a_model_that_reads_padding_gets_none(small_model: Callable[..., Any], prompts: Prompts) -> None:
    rows = [prompts.of_text(text) for text in ("ab", "cd", "efg")]
    rwkv = small_model("RwkvConfig", vocab_size=105)
    assert len(answer_batch(rwkv, prompts, rows[:2], TEN)) == 2
    with pytest.raises(
        ConfigError, match="a RwkvForCausalLM reads padding as text; ask prompts of one length, or set ba"
    ):
        answer_batch(rwkv, prompts, rows, TEN)


def by_bytes() -> Any:
    """A tokenizer whose tokens are single bytes, and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({char: number for number, char in enumerate(alphabet)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def by_words() -> Any:
    """A tokenizer in the manner of SentencePiece: the space in front of the first word is dropped."""
    core = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "c": 2, "▁": 3}, unk_token="c"))
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core)


BYTES, WORDS = by_bytes(), by_words()


def pieces_of(tokenizer: Any, tokens: list[int]) -> list[str]:
    pieces = TextPieces(tokenizer)
    return [*(pieces.add(token) for token in tokens), pieces.rest()]


def test_bytes_of_a_character_come_together() -> None:
    text = "é 👍🏽 日本"
    pieces = pieces_of(BYTES, BYTES(text)["input_ids"])
    assert [piece for piece in pieces if piece] == list(text)
    assert pieces[:3] == ["", "é", " "]


def test_a_character_that_is_never_completed_comes_at_the_end() -> None:
    tokens = BYTES("👍")["input_ids"]
    assert pieces_of(BYTES, tokens[:2]) == ["", "", INCOMPLETE]
    broken = pieces_of(BYTES, [*tokens[:2], *BYTES("a")["input_ids"]])
    assert broken == ["", "", f"{INCOMPLETE}a", ""]


@pytest.mark.parametrize(("tokenizer", "size"), [(BYTES, 256), (WORDS, 4)], ids=["bytes", "words"])
@given(data=st.data())
def test_pieces_joined_are_the_whole_text(tokenizer: Any, size: int, data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, size - 1), max_size=12))
    whole = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    assert "".join(pieces_of(tokenizer, tokens)) == whole


def test_special_tokens_are_left_out() -> None:
    assert pieces_of(BYTES, [*BYTES("a")["input_ids"], BYTES.eos_token_id]) == ["a", "", ""]
