"""Tests of batches: packed and padded rows, the order of an epoch, and settings that are refused."""

from __future__ import annotations

import functools
import itertools
import random
import tracemalloc
from array import array
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.data.batching import batches, batches_of_epoch, epoch_order
from qlora_lite.data.encoding import TokenizedExample
from qlora_lite.errors import ConfigError


def numbered(lengths: list[int]) -> list[TokenizedExample]:
    """Examples without a token in common, so that each token says where it came from."""
    starts = [1, *itertools.accumulate(lengths, initial=1)][1:]
    spans = [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=False)]
    return [TokenizedExample(span, [*span[:1], IGNORE_INDEX, *span[2:]] if len(span) > 2 else span) for span in spans]


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
    assert list(epoch_order(5, 0, 0)) == [1, 0, 3, 4, 2], "a stored run must find the same order again"


def packed_rows(examples: Any, seed: int = 0, epochs: int = 1, batch_size: int = 4) -> list[tuple[int, ...]]:
    """The first token of each example in each row, without the padding."""
    made = batches(examples, batch_size, seed, pad_token_id=0, epochs=epochs, packing=True, max_length=20)
    rows = [row for batch in made for row in zip(batch["input_ids"], batch["position_ids"], strict=True)]
    return [tuple(int(token) for token in ids[(positions == 0) & (ids != 0)]) for ids, positions in rows]


def test_packed_rows_are_shuffled_anew_in_each_epoch_and_equal_for_equal_seeds() -> None:
    generator = random.Random(0)
    lengths = [generator.randint(1, 20) for _ in range(200)]
    examples = numbered(lengths)
    length_of = {example.input_ids[0]: len(example.input_ids) for example in examples}
    rows = packed_rows(examples, epochs=2)
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert packed_rows(examples, epochs=2) == rows and packed_rows(examples, batch_size=1, epochs=2) == rows
    assert packed_rows(examples, seed=1) != first
    for epoch in (first, second):
        assert sorted(token for row in epoch for token in row) == sorted(length_of)
        assert all(sum(length_of[token] for token in row) <= 20 for row in epoch)
        longest = [length_of[row[0]] for row in epoch]
        halves = sum(longest[: len(epoch) // 2]), sum(longest[len(epoch) // 2 :])
        assert max(halves) < 1.3 * min(halves), "rows come sorted by the length of their examples"
    assert [[length_of[token] for token in row] for row in first] != [
        [length_of[token] for token in row] for row in second
    ]
    assert {frozenset(row) for row in first} != {frozenset(row) for row in second}, "equal lengths keep their partners"


class Stored(Sequence[TokenizedExample]):
    """Examples that note which of them are read, with known lengths and an order of their own."""

    def __init__(self, examples: list[TokenizedExample], lengths: Any) -> None:
        self.examples, self.lengths, self.read = examples, lengths, list[int]()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        self.read.append(index)
        return self.examples[index]


class Ordered(Stored):
    def epoch_order(self, seed: int, epoch: int) -> Sequence[int]:
        return torch.tensor([seed, epoch, seed]).tolist()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", [list, torch.tensor, functools.partial(torch.tensor, dtype=torch.int32)])
def test_examples_of_known_lengths_are_read_with_their_batch(packing: bool, kind: Any) -> None:
    examples = numbered([3, 9, 2, 5, 7, 1, 4, 4, 8, 6])
    lengths = [len(example.input_ids) for example in examples]
    stored = Stored(examples, kind(lengths))
    options: dict[str, Any] = {"pad_token_id": 0, "epochs": 2, "packing": packing, "max_length": 20}
    made = batches(stored, 2, 0, **options)
    first = next(made)
    assert sum(lengths[index] for index in stored.read) == int((first["input_ids"] != 0).sum())
    for batch, expected in zip([first, *made], batches(examples, 2, 0, **options), strict=True):
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    with pytest.raises(ConfigError, match=r"must hold the longest example; tokenize .*; got '8 for 9 tokens'"):
        batches(Stored(examples, kind(lengths)), 2, 0, **(options | {"max_length": 8}))


@pytest.mark.parametrize("packing", [False, True])
def test_examples_may_give_the_order_of_an_epoch(packing: bool) -> None:
    examples = Ordered(numbered([3, 3, 3, 3]), [3] * 4)
    made = batches(examples, 3, 3, pad_token_id=0, epochs=2, packing=packing, max_length=3)
    assert [sorted(batch["input_ids"][:, 0].tolist()) for batch in made] == [[1, 10, 10], [4, 10, 10]]

    class Nothing(Stored):
        def epoch_order(self, seed: int, epoch: int) -> Sequence[int]:
            return []

    with pytest.raises(ConfigError, match="epoch_order of the examples must give at least one index"):
        next(batches(Nothing(numbered([3]), [3]), 1, 0, pad_token_id=0))


def test_a_large_epoch_costs_eight_bytes_an_example() -> None:
    examples = Stored(numbered([2]) * 50_000, array("q", [2]) * 50_000)
    tracemalloc.start()
    next(batches(examples, 1, 0, pad_token_id=0))
    epoch_order(50_000, 0, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * 50_000


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


@pytest.mark.parametrize("packing", [False, True])
def test_the_batches_of_an_epoch_are_counted(packing: bool) -> None:
    some = [TokenizedExample(list(range(2 + n % 7)), list(range(2 + n % 7))) for n in range(23)]
    shape = {"packing": packing, "max_length": 9 if packing else None}
    found = list(batches(some, 3, seed=4, pad_token_id=0, epochs=2, **shape))  # type: ignore[arg-type]
    assert 2 * batches_of_epoch(some, 3, 4, 9 if packing else None) == len(found) > 2
