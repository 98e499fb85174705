"""Tests of rows of running text."""

from __future__ import annotations

import pytest
import torch

from qlora_lite.calibration.windows import text_windows
from qlora_lite.data.encoding import TokenizedExample
from qlora_lite.errors import CheckpointError, ConfigError


def examples(count: int, length: int) -> list[TokenizedExample]:
    """Examples of which no two share a token."""
    ids = [list(range(first * length, (first + 1) * length)) for first in range(count)]
    return [TokenizedExample(row, row) for row in ids]


@pytest.mark.parametrize(
    ("count", "length", "tokens", "rows", "held_out", "window"),
    [
        (200, 100, 4096, 8, 8, 512),  # more text than is asked for
        (60, 100, 8192, 9, 2, 512),  # less: a fifth is held out
        (10, 30, 8192, 3, 1, 75),  # little: shorter rows
        (200, 100, 100, 1, 8, 100),
    ],
)
def test_rows_are_full_and_those_held_out_are_others(
    count: int, length: int, tokens: int, rows: int, held_out: int, window: int
) -> None:
    text, others = text_windows(examples(count, length), tokens)
    found = [torch.cat([batch["input_ids"] for batch in batches]) for batches in (text, others)]
    assert [tuple(ids.shape) for ids in found] == [(rows, window), (held_out, window)]
    everything = torch.cat([ids.flatten() for ids in found])
    assert len(everything.unique()) == len(everything)
    assert all(len(batch["input_ids"]) <= 4 for batch in (*text, *others))
    again, _ = text_windows(examples(count, length), tokens)
    assert torch.equal(again[0]["input_ids"], text[0]["input_ids"])
    assert not torch.equal(everything, everything.sort()[0])  # shuffled


def test_too_little_text_is_refused() -> None:
    with pytest.raises(CheckpointError, match="the text has 60 tokens; calibration needs 64, and better thousands"):
        text_windows(examples(6, 10), 8192)
    with pytest.raises(ConfigError, match="calibration tokens must be an integer of at least 64; got 63"):
        text_windows(examples(6, 100), 63)
