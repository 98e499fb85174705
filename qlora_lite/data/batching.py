"""Which loss a model is trained with: the one without logits where it equals the model's own, else the model's.

Both are sums over labelled tokens, so that gradients of several batches add up to those of one large batch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qlora_lite.checks import is_count, require
from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.data.tokenization import TokenizedExample

Batch = dict[str, Tensor]

# First-fit looks at this many of the newest rows, so that packing n examples takes time proportional to n.
OPEN_ROWS = 256


def labelled_tokens(batch: Batch) -> Tensor:
    """How many tokens of the batch are predicted (int64 scalar); the first of a row never is."""
    return (batch["labels"][:, 1:] != IGNORE_INDEX).sum()


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of `count` examples in one epoch; a function of its arguments alone, so that a run can be resumed."""
    order = list(range(count))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Indices of examples put first-fit, in the given order, into rows of at most `max_length` tokens.

    Every index occurs once. Only the newest OPEN_ROWS rows are tried. Raises ConfigError for a longer example.
    """
    longest = max(lengths, default=0)
    require(longest <= max_length, "max_length must hold the longest example", f"{max_length} for {longest} tokens")
    rows: list[list[int]] = []
    space: list[int] = []
    for index, length in enumerate(lengths):
        oldest = max(0, len(rows) - OPEN_ROWS)
        row = next((r for r in range(oldest, len(rows)) if space[r] >= length), len(rows))
        if row == len(rows):
            rows.append([])
            space.append(max_length)
        rows[row].append(index)
        space[row] -= length
    return rows


def batches(
    examples: Sequence[TokenizedExample],
    batch_size: int,
    seed: int,
    *,
    pad_token_id: int,
    epochs: int | None = None,
    packing: bool = False,
    max_length: int | None = None,
) -> Iterator[Batch]:
    """int64 tensors `input_ids`, `labels` of shape (rows <= batch_size, longest row), reshuffled in each epoch.

    Rows are filled at the end: labels IGNORE_INDEX there. With one example per row there is an `attention_mask`, 1 on
    tokens and 0 on filling. With `packing`, a row holds several examples, at most `max_length` tokens, and there are
    `position_ids` that begin anew with each, and no `attention_mask`: from these transformers builds a mask that
    lets no example see another, **if the model is called with `use_cache=False`**.
    epochs: None goes on without end. Raises ConfigError for settings that cannot be, before the first batch.
    """
    require(len(examples) > 0, "batches needs at least one example", len(examples))
    require(is_count(batch_size, 1), "batch_size must be an integer of at least 1", batch_size)
    require(is_count(seed, 0), "seed must be an integer of at least 0", seed)
    require(is_count(pad_token_id, 0), "pad_token_id must be a token id; eos serves as well as any", pad_token_id)
    require(epochs is None or is_count(epochs, 1), "epochs must be None or an integer of at least 1", epochs)
    if packing or max_length is not None:
        require(is_count(max_length, 2), "max_length must be at least 2, and packing needs it", max_length)
        longest = max(len(example.input_ids) for example in examples)
        wanted = "max_length must hold the longest example; tokenize with the same max_length"
        require(longest <= int(max_length or 0), wanted, f"{max_length} for {longest} tokens")
    return _batches(examples, batch_size, seed, pad_token_id, epochs, int(max_length or 0) if packing else None)


def _batches(
    examples: Sequence[TokenizedExample],
    batch_size: int,
    seed: int,
    pad_token_id: int,
    epochs: int | None,
    packed_length: int | None,
) -> Iterator[Batch]:
    epoch = 0
    while epochs is None or epoch < epochs:
        order = epoch_order(len(examples), seed, epoch)
        rows = [[index] for index in order]
        if packed_length is not None:
            lengths = [len(examples[index].input_ids) for index in order]
            rows = [[order[place] for place in row] for row in pack(lengths, packed_length)]
        for first in range(0, len(rows), batch_size):
            chosen = [[examples[index] for index in row] for row in rows[first : first + batch_size]]
            yield _collate(chosen, pad_token_id, with_positions=packed_length is not None)
        epoch += 1


def _collate(rows: list[list[TokenizedExample]], pad_token_id: int, with_positions: bool) -> Batch:
    lengths = [sum(len(example.input_ids) for example in row) for row in rows]
    filling = [max(lengths) - length for length in lengths]
    ids = [[token for example in row for token in example.input_ids] for row in rows]
    # The first token of an example has nothing before it; in a packed row the example in front must not predict it.
    labels = [[label for example in row for label in (IGNORE_INDEX, *example.labels[1:])] for row in rows]
    batch = {
        "input_ids": torch.tensor([row + [pad_token_id] * n for row, n in zip(ids, filling, strict=True)]),
        "labels": torch.tensor([row + [IGNORE_INDEX] * n for row, n in zip(labels, filling, strict=True)]),
    }
    if not with_positions:
        masks = [[1] * length + [0] * n for length, n in zip(lengths, filling, strict=True)]
        return batch | {"attention_mask": torch.tensor(masks)}
    # The filling counts from 0 too: as one more example it sees, and is seen by, none of the others.
    sizes = [[*(len(example.input_ids) for example in row), n] for row, n in zip(rows, filling, strict=True)]
    positions = [[position for size in row for position in range(size)] for row in sizes]
    return batch | {"position_ids": torch.tensor(positions)}
