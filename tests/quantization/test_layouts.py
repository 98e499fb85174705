"""Tests of the buffers of each layout, worked out by hand."""

from __future__ import annotations

import pytest

from qlora_lite.errors import ConfigError
from qlora_lite.quantization.layouts import BLOCKS, ROWS, Buffer, block_count, check_blocksize


def test_buffers_of_blocks() -> None:
    assert BLOCKS.buffers((33, 65), 4, 64, False) == {
        "packed": Buffer((1073,), "uint8"),
        "absmax": Buffer((34,), "float32"),
    }
    nested = BLOCKS.buffers((1000, 64), 4, 64, True)
    assert nested["absmax"] == Buffer((1000,), "uint8") and nested["nested_absmax"] == Buffer((4,), "float32")
    assert sum(buffer.bytes for buffer in nested.values()) == 32_000 + 1000 + 16 + 4 + 1024


def test_buffers_of_rows() -> None:
    found = ROWS.buffers((3, 5), 8, 64, True)
    assert found == {"packed": Buffer((3, 5), "int8"), "absmax": Buffer((3,), "float32")}


def test_slices_begin_where_blocks_do() -> None:
    assert BLOCKS.row_step((9, 96), 64) == 2 and BLOCKS.row_step((9, 64), 64) == 1 and ROWS.row_step((9, 5), 64) == 1
    assert block_count(65, 64) == 2


def test_unknown_block_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="got 63"):
        check_blocksize(63)
