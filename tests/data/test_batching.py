"""Tests of batches: packed and padded rows, the order of an epoch, and settings that are refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.data.batching import batches, epoch_order, pack
from qlora_lite.data.encoding import TokenizedExample
from qlora_lite.errors import ConfigError


def numbered(lengths: list[int]) -> list[TokenizedExample]:
    """Examples without a token in common, so that each token says where it came from."""
    starts = [1, *itertools.accumulate(lengths, initial=1)][1:]
    spans = [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=False)]
    return [TokenizedExample(span, [*span[:1], IGNORE_INDEX, *span[2:]] if len(span) > 2 else span) for span in spans]


@given(st.lists(st.integers(1, 12), max_size=600), st.integers(12, 30))
@settings(deadline=None)
def test_packing_puts_every_example_into_one_row_that_holds_it(lengths: list[int], max_length: int) -> None:
    rows = pack(lengths, max_length)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    totals = [sum(lengths[index] for index in row) for row in rows]
    assert all(0 < total <= max_length for total in totals)
    # First-fit leaves at most one row half empty, among those that are open together.
    assert sum(2 * total <= max_length for total in totals) <= 1 + len(rows) // 256


def test_packing_is_first_fit() -> None:
    assert pack([5, 4, 6, 3, 2, 1], 9) == [[0, 1], [2, 3], [4, 5]]
    assert pack([], 9) == []
    with pytest.raises(ConfigError, match="must hold the longest example; got '9 for 10 tokens'"):
        pack([10], 9)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(1, 5), st.integers(0, 99), st.booleans())
@settings(deadline=None)
def test_an_epoch_holds_every_token_once_with_its_label(
    lengths: list[int], batch_size: int, seed: int, packing: bool
) -> None:
    examples = numbered(lengths)
    label_of = {t: lab for e in examples for t, lab in zip(e.input_ids, (IGNORE_INDEX, *e.labels[1:]), strict=True)}
    limit = 12 if packing else None
    seen = []
    for batch in batches(examples, batch_size, seed, pad_token_id=0, epochs=1, packing=packing, max_length=limit):
        ids, labels = batch["input_ids"], batch["labels"]
        assert ids.dtype == labels.dtype == torch.int64
        assert ids.shape == labels.shape and ids.shape[0] <= batch_size and ids.shape[1] <= (limit or 9)
        tokens = ids != 0
        assert bool(tokens.any(0).all()), "a column of nothing but filling"
        assert bool((labels[~tokens] == IGNORE_INDEX).all())
        assert labels[tokens].tolist() == [label_of[token] for token in ids[tokens].tolist()]
        assert set(batch) == {"input_ids", "labels", "position_ids" if packing else "attention_mask"}
        if packing:
            first_tokens = torch.isin(ids, torch.tensor([example.input_ids[0] for example in examples]))
            assert bool((batch["position_ids"][first_tokens] == 0).all())
            assert int((batch["position_ids"][tokens] == 0).sum()) == int(first_tokens.sum())
        else:
            assert torch.equal(batch["attention_mask"], tokens.long())
        seen += ids[tokens].tolist()
    assert sorted(seen) == sorted(label_of)


def test_order_depends_on_seed_and_epoch_alone_and_never_ends() -> None:
    examples = numbered([3] * 10)

    def epochs(seed: int, count: int) -> list[list[int]]:
        drawn = itertools.islice(batches(examples, 5, seed, pad_token_id=0), 2 * count)
        flat = [token for batch in drawn for token in batch["input_ids"][:, 0].tolist()]
        return [flat[i : i + 10] for i in range(0, len(flat), 10)]

    assert epochs(3, 4) == epochs(3, 4)
    assert epochs(3, 4) != epochs(4, 4)
    assert len({tuple(order) for order in epochs(3, 4)}) == 4
    firsts = [example.input_ids[0] for example in examples]
    assert epochs(3, 4)[2] == [firsts[index] for index in epoch_order(10, seed=3, epoch=2)]
    assert epoch_order(5, 0, 0) == [1, 0, 3, 4, 2], "a stored run must find the same order again"


@pytest.mark.parametrize(
    ("settings_given", "says"),
    [
        ({"batch_size": 0}, "batch_size must be"),
        ({"seed": -1}, "seed must be"),
        ({"epochs": 0}, "epochs must be None"),
        ({"pad_token_id": None}, "pad_token_id must be a token id"),
        ({"packing": True}, "packing needs it"),
        ({"max_length": 4}, "must hold the longest example; tokenize with the same max_length; got '4 for 5 tokens'"),
        ({"examples": []}, "at least one example"),
    ],
)
def test_settings_are_refused_before_the_first_batch(settings_given: dict[str, Any], says: str) -> None:
    arguments: dict[str, Any] = {"examples": numbered([5]), "batch_size": 1, "seed": 0, "pad_token_id": 0}
    with pytest.raises(ConfigError, match=says):
        batches(**(arguments | settings_given))


def tiny_llama(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation=attention, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def label_losses(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    """The loss of every learned token, by the token; no two examples have one in common."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    places = (batch["labels"][:, 1:] != IGNORE_INDEX).nonzero().tolist()
    return {int(batch["input_ids"][row, column + 1]): losses[row, column] for row, column in places}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_packed_examples_have_the_losses_they_have_alone(attention: str, batch_size: int) -> None:
    model = tiny_llama(attention)
    examples = numbered([4, 9, 3, 7, 5, 2, 8, 6, 4, 7])
    alone: dict[int, torch.Tensor] = {}
    for batch in batches(examples, 1, 0, pad_token_id=0, epochs=1):
        alone |= label_losses(model, batch)
    packed: dict[int, torch.Tensor] = {}
    shapes = []
    for batch in batches(examples, batch_size, 0, pad_token_id=0, epochs=1, packing=True, max_length=20):
        packed |= label_losses(model, batch)
        shapes.append(batch["input_ids"].shape)
    assert len(alone) == sum(example.learned_tokens for example in examples)
    assert sum(rows for rows, _ in shapes) < len(examples), "nothing was packed"
    assert alone.keys() == packed.keys()
    for token, loss in alone.items():
        torch.testing.assert_close(packed[token], loss, rtol=1e-5, atol=1e-5)
