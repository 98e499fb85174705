"""Batches of tokenized examples: shuffled by epoch, padded, or packed with several examples in a row."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from qlora_lite.architecture import ROWS
from qlora_lite.checks import is_count, require
from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.data.encoding import TokenizedExample
from qlora_lite.data.images.processor import ImageProcessor
from qlora_lite.data.packing import INDICES, as_array, pack
from qlora_lite.errors import ConfigError

Batch = dict[str, Tensor]


def has_images(batch: Batch) -> bool:
    """Whether a batch is of a set with images, and may have arrays whose first dimension is not that of its rows."""
    return any(name.endswith(ROWS) for name in batch)


def lacks_images(batch: Batch) -> bool:
    """Whether a batch of a set with images has text alone."""
    return has_images(batch) and not any(bool(value.any()) for name, value in batch.items() if name.endswith(ROWS))


def rows_between(batch: Batch, first: int, last: int) -> Batch:
    """Returns rows of a batch. An array with an entry `<name>.rows` has as many entries for each row as this says."""
    found = {name: value[first:last] for name, value in batch.items() if f"{name}{ROWS}" not in batch}
    for name in batch.keys() - found.keys():
        counts = batch[f"{name}{ROWS}"]
        start, count = int(counts[:first].sum()), int(counts[first:last].sum())
        if count:
            found[name] = batch[name][start : start + count]
        else:
            del found[f"{name}{ROWS}"]  # a row without images has no arrays of them
    return found


def labelled_tokens(batch: Batch) -> Tensor:
    """Returns the number of labelled tokens (int64 scalar), without the first of each row, which is not predicted."""
    return (batch["labels"][:, 1:] != IGNORE_INDEX).sum()


def epoch_order(count: int, seed: int, epoch: int) -> Sequence[int]:
    """Returns the order of `count` examples in one epoch. It depends on the arguments only, so a run can be resumed."""
    return _shuffled(count, f"{seed} {epoch}")


def _shuffled(count: int, key: str) -> array[int]:
    """Returns the numbers below `count` in an order that depends on the key."""
    order = array(INDICES, range(count))
    random.Random(key).shuffle(order)
    return order


def example_lengths(examples: Sequence[TokenizedExample]) -> array[int]:
    """Returns the tokens of each example: the attribute `lengths` of `examples` if there is one, else counted."""
    known = getattr(examples, "lengths", None)
    return array(INDICES, (len(example.input_ids) for example in examples)) if known is None else as_array(known)


def batches(
    examples: Sequence[TokenizedExample],
    batch_size: int,
    seed: int,
    *,
    pad_token_id: int,
    epochs: int | None = None,
    packing: bool = False,
    max_length: int | None = None,
    images: ImageProcessor | None = None,
) -> Iterator[Batch]:
    """Returns an iterator of batches, in a new order in each epoch.

    examples: if they have an attribute `lengths`, the number of tokens of each, an example is read only when its batch
    is made. If they have a method `epoch_order(seed, epoch)`, it returns the indices of an epoch in their order, in
    place of the function of this name.
    A batch has int64 tensors `input_ids` and `labels` of shape (rows, tokens): rows <= batch_size, tokens of the
    longest row. Shorter rows are padded at the end, with label IGNORE_INDEX.
    Without `packing`, a row is one example, and `attention_mask` is 1 on tokens and 0 on padding.
    With `packing`, a row has several examples, of at most `max_length` tokens together (`pack`), and the rows of an
    epoch are shuffled too. `position_ids` start at 0 for each example, and there is no `attention_mask`: transformers
    builds a mask from the positions in which no example attends to another, **if the model is called with
    `use_cache=False`**.
    epochs: None repeats without end. images: reads the images of examples, when their batch is made. The arrays that
    the model takes of them are in the batch under the processor's names, and `<name>.rows` says how many entries of the
    first dimension belong to each row.
    Raises ConfigError for wrong settings before the first batch is made.
    """
    require(len(examples) > 0, "batches needs at least one example", len(examples))
    require(is_count(batch_size, 1), "batch_size must be an integer of at least 1", batch_size)
    require(is_count(seed, 0), "seed must be an integer of at least 0", seed)
    require(is_count(pad_token_id, 0), "pad_token_id must be a token id, such as that of eos", pad_token_id)
    require(epochs is None or is_count(epochs, 1), "epochs must be None or an integer of at least 1", epochs)
    if packing or max_length is not None:
        require(is_count(max_length, 2), "max_length must be at least 2, and packing needs it", max_length)
        longest = max(example_lengths(examples))
        wanted = "max_length must hold the longest example; tokenize with the same max_length"
        require(longest <= int(max_length or 0), wanted, f"{max_length} for {longest} tokens")
    with_images = has_image_examples(examples)
    if with_images:
        _check_images(images, packing)
    row_length = int(max_length or 0) if packing else None
    return _batches(examples, batch_size, seed, pad_token_id, epochs, row_length, images, with_images)


def has_image_examples(examples: Sequence[TokenizedExample]) -> bool:
    """Whether any of the examples has images: by their attribute `has_images`, or by looking at each.

    Examples that are read with their batch (`lengths`) are not read for this.
    """
    known: bool | None = getattr(examples, "has_images", None)
    if known is None:
        return not hasattr(examples, "lengths") and any(example.images for example in examples)
    return known


def _check_images(images: ImageProcessor | None, packing: bool) -> None:
    """Raises ConfigError for settings with which images would not reach the model."""
    if packing:
        raise ConfigError("examples with images each need a row of their own; leave out packing (--packing)")
    if images is None:
        raise ConfigError("the examples have images; give images=ImageProcessor(...), of the model's checkpoint")


def batches_of_epoch(
    examples: Sequence[TokenizedExample], batch_size: int, seed: int, packed_length: int | None
) -> int:
    """Returns the number of batches of the first epoch of `batches`; packed_length: of packed rows, else None.

    Later epochs have as many, except with packing and shares of sources, where other examples come in each.
    """
    order = _epoch(examples, seed, 0)
    return sum(1 for _ in _grouped(examples, order, batch_size, f"{seed} 0 rows", packed_length))


def _epoch(examples: Sequence[TokenizedExample], seed: int, epoch: int) -> Sequence[int]:
    own_order: Callable[[int, int], Sequence[int]] | None = getattr(examples, "epoch_order", None)
    order = epoch_order(len(examples), seed, epoch) if own_order is None else own_order(seed, epoch)
    require(len(order) > 0, "epoch_order of the examples must give at least one index", len(order))
    return order


def _batches(
    examples: Sequence[TokenizedExample],
    batch_size: int,
    seed: int,
    pad_token_id: int,
    epochs: int | None,
    packed_length: int | None,
    images: ImageProcessor | None,
    with_images: bool,
) -> Iterator[Batch]:
    epoch = 0
    while epochs is None or epoch < epochs:
        order = _epoch(examples, seed, epoch)
        for rows in _grouped(examples, order, batch_size, f"{seed} {epoch} rows", packed_length):
            chosen = [[examples[index] for index in row] for row in rows]
            batch = _collate(chosen, pad_token_id, with_positions=packed_length is not None)
            if with_images or any(example.images for row in chosen for example in row):
                _check_images(images, packed_length is not None)
                assert images is not None
                batch |= images.batch([row[0].images for row in chosen], batch["input_ids"])
            yield batch
        epoch += 1


def _grouped(
    examples: Sequence[TokenizedExample], order: Sequence[int], batch_size: int, key: str, packed_length: int | None
) -> Iterator[Sequence[Sequence[int]]]:
    """Yields the rows of indices of each batch of one epoch. key: decides on the order of packed rows."""
    if packed_length is None:
        for first in range(0, len(order), batch_size):
            yield [[index] for index in order[first : first + batch_size]]
        return
    lengths = example_lengths(examples)
    packed = pack(array(INDICES, (lengths[index] for index in order)), packed_length)
    # As packed, rows are sorted by the length of their examples, which would change in the course of an epoch.
    shuffled = _shuffled(len(packed), key)
    for first in range(0, len(packed), batch_size):
        yield [[order[place] for place in packed[row]] for row in shuffled[first : first + batch_size]]


def _collate(rows: list[list[TokenizedExample]], pad_token_id: int, with_positions: bool) -> Batch:
    lengths = [sum(len(example.input_ids) for example in row) for row in rows]
    padding = [max(lengths) - length for length in lengths]
    ids = [[token for example in row for token in example.input_ids] for row in rows]
    # In a packed row, the last token of one example must not learn to predict the first token of the next one.
    labels = [[label for example in row for label in (IGNORE_INDEX, *example.labels[1:])] for row in rows]
    batch = {
        "input_ids": torch.tensor([row + [pad_token_id] * n for row, n in zip(ids, padding, strict=True)]),
        "labels": torch.tensor([row + [IGNORE_INDEX] * n for row, n in zip(labels, padding, strict=True)]),
    }
    if not with_positions:
        masks = [[1] * length + [0] * n for length, n in zip(lengths, padding, strict=True)]
        return batch | {"attention_mask": torch.tensor(masks)}
    # The positions of the padding start at 0 too, so that it is masked as one more example.
    sizes = [[*(len(example.input_ids) for example in row), n] for row, n in zip(rows, padding, strict=True)]
    positions = [[position for size in row for position in range(size)] for row in sizes]
    return batch | {"position_ids": torch.tensor(positions)}
