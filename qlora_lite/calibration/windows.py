"""Rows of text of one length for calibration, and others that are held out of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_lite.checks import is_count, require
from qlora_lite.data.batching import epoch_order
from qlora_lite.data.encoding import TokenizedExample
from qlora_lite.errors import CheckpointError

# Tokens of a row, and rows of a batch.
WINDOW, ROWS = 512, 4
# The share of the rows that are held out at least, where there are fewer than are asked for, and at most so many rows.
HELD_OUT_SHARE, MOST_HELD_OUT = 0.2, 8
# With less text than this there are fewer rows than it takes to say anything.
LEAST_TOKENS = 64


def text_windows(
    examples: Sequence[TokenizedExample], tokens: int, window: int = WINDOW
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Returns batches of running text to calibrate on, of about `tokens` tokens, and batches that are held out.

    Examples are shuffled, the same in each call, and follow one another. The first rows are calibrated on, and those
    after them are held out. Rows are shorter than `window` where there is little text. Raises CheckpointError for less
    than `LEAST_TOKENS` tokens, and ConfigError for a wrong number.
    """
    require(is_count(tokens, LEAST_TOKENS), f"calibration tokens must be an integer of at least {LEAST_TOKENS}", tokens)
    order = epoch_order(len(examples), 0, 0)
    wanted = tokens + MOST_HELD_OUT * window
    ids = list(itertools.islice(itertools.chain.from_iterable(examples[i].input_ids for i in order), wanted))
    if len(ids) < LEAST_TOKENS:
        raise CheckpointError(f"the text has {len(ids)} tokens; calibration needs {LEAST_TOKENS}, and better thousands")
    length = min(window, tokens, len(ids) // 4)
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    held_out = min(MOST_HELD_OUT, max(1, round(HELD_OUT_SHARE * len(rows))))
    calibrated = rows[: min(len(rows) - held_out, -(-tokens // length))]
    others = rows[len(calibrated) :][:MOST_HELD_OUT]
    return [[{"input_ids": part} for part in text.split(ROWS)] for text in (calibrated, others)]  # type: ignore[return-value]
