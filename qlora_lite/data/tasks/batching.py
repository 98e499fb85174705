"""Batches of the examples of tasks, padded; as dicts of tensors with a row for each example.

input_ids, attention_mask          the first text of each example (token_type_ids, if the tokenizer has them)
labels                             (rows,) int64 classes or float32 numbers, (rows, classes) float32 of several,
                                   (rows, tokens) int64 of words
rejected_input_ids, ..._mask       the other text of a preference
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qlora_lite.checks import is_count, require
from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.data.batching import Batch
from qlora_lite.data.mixture import Mixture
from qlora_lite.data.tasks.encoding import NO_LABEL
from qlora_lite.data.tasks.examples import TaskExample
from qlora_lite.data.tasks.labels import (
    MASKED,
    NUMBERS,
    PREFERENCES,
    SEVERAL,
    SIMILAR,
    TARGETS,
    WORDS,
    Labels,
    as_number,
)
from qlora_lite.data.tasks.masking import Masking

# The texts of an example after its first one.
OTHER_TEXTS = {PREFERENCES: ("rejected_",), SIMILAR: ("positive_", "negative_")}


def task_batches(
    examples: Mixture,
    labels: Labels,
    batch_size: int,
    seed: int,
    *,
    pad_token_id: int,
    epochs: int | None = None,
    masking: Masking | None = None,
) -> Iterator[Batch]:
    """Returns an iterator of batches of the examples of a task, in a new order in each epoch, as `batches` does.

    labels: what the examples have to say. epochs: None repeats without end. masking: `Masking.of` the tokenizer, for a
    masked language model.
    """
    require(labels.kind != MASKED or masking is not None, "a masked language model needs masking", masking)
    require(len(examples) > 0, "task_batches needs at least one example", len(examples))
    require(is_count(batch_size, 1), "batch_size must be an integer of at least 1", batch_size)
    require(is_count(seed, 0), "seed must be an integer of at least 0", seed)
    require(is_count(pad_token_id, 0), "pad_token_id must be a token id, such as that of eos", pad_token_id)
    return _batches(examples, labels, batch_size, seed, pad_token_id, epochs, masking)


def _batches(
    examples: Mixture,
    labels: Labels,
    batch_size: int,
    seed: int,
    pad_token_id: int,
    epochs: int | None,
    masking: Masking | None,
) -> Iterator[Batch]:
    epoch = 0
    while epochs is None or epoch < epochs:
        order = examples.epoch_order(seed, epoch)
        for first in range(0, len(order), batch_size):
            found = (examples[index] for index in order[first : first + batch_size])
            chosen = [example for example in found if isinstance(example, TaskExample)]
            if masking is None:
                yield collated(chosen, labels, pad_token_id)
            else:
                yield _with_hidden(chosen, masking, random.Random(f"{seed} {epoch} {first} hidden"), pad_token_id)
        epoch += 1


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def _texts(rows: Sequence[Sequence[int]], pad_token_id: int, prefix: str = "") -> Batch:
    masks = [[1] * len(row) for row in rows]
    return {f"{prefix}input_ids": _padded(rows, pad_token_id), f"{prefix}attention_mask": _padded(masks, 0)}


def _with_hidden(examples: Sequence[TaskExample], masking: Masking, draws: random.Random, pad_token_id: int) -> Batch:
    rows = [masking.hidden(example.texts[0], draws) for example in examples]
    batch = _texts([given for given, _ in rows], pad_token_id)
    return {**batch, "labels": _padded([labels for _, labels in rows], IGNORE_INDEX)}


def collated(examples: Sequence[TaskExample], labels: Labels, pad_token_id: int) -> Batch:
    """Returns the batch of some examples."""
    texts = [example.texts for example in examples]
    batch = _texts([own[0] for own in texts], pad_token_id)
    if any(example.second is not None for example in examples):
        seconds = [len(own[0]) if row.second is None else row.second for row, own in zip(examples, texts, strict=True)]
        types = [[0] * first + [1] * (len(own[0]) - first) for first, own in zip(seconds, texts, strict=True)]
        batch["token_type_ids"] = _padded(types, 0)
    if labels.kind in OTHER_TEXTS:
        prefixes = OTHER_TEXTS[labels.kind][: len(texts[0]) - 1]
        for number, prefix in enumerate(prefixes, 1):
            batch |= _texts([own[number] for own in texts], pad_token_id, prefix)
        return {**batch, "labels": torch.ones(len(texts))}
    if labels.kind == TARGETS:
        return {**batch, "labels": _padded([own[1] for own in texts], IGNORE_INDEX)}
    return {**batch, "labels": _labels(examples, labels)}


def _labels(examples: Sequence[TaskExample], labels: Labels) -> Tensor:
    if labels.kind == NUMBERS:
        return torch.tensor([as_number(example.answer) for example in examples], dtype=torch.float32)
    if labels.kind == SEVERAL:
        several = torch.zeros(len(examples), len(labels.names))
        for row, example in enumerate(examples):
            several[row, [labels.number(name) for name in example.answer]] = 1
        return several
    if labels.kind == WORDS:
        return _padded([_of_words(example, labels) for example in examples], IGNORE_INDEX)
    return torch.tensor([labels.number(example.answer) for example in examples])


def _of_words(example: TaskExample, labels: Labels) -> list[int]:
    """The class of each token that begins a word, else IGNORE_INDEX."""
    names, words = example.answer
    numbers = [labels.number(name) for name in names]
    return [IGNORE_INDEX if word == NO_LABEL else numbers[word] for word in words]
