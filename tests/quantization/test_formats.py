"""Tests of the arithmetic of formats against the bytes of packed weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lite.errors import ConfigError
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.formats import FORMATS, either, format_named, storage_bytes
from qlora_lite.quantization.layouts import BLOCKSIZES
from qlora_lite.quantization.packed_weight import PackedWeight


@settings(max_examples=60)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from(sorted(FORMATS)),
    st.sampled_from(BLOCKSIZES),
    st.booleans(),
)
def test_formula_is_what_is_held(rows: int, columns: int, format: str, blocksize: int, double_quant: bool) -> None:
    packed = PackedWeight.of(torch.randn(rows, columns), QuantConfig(format, blocksize, double_quant))
    held = sum(buffer.numel() * buffer.element_size() for buffer in packed.buffers())
    assert held == storage_bytes((rows, columns), format, blocksize, double_quant) == packed.storage_bytes()


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="nf4, fp4, int8; got 'nf3'"):
        format_named("nf3")


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_flags_of_a_row_say_what_its_kernels_can_do(name: str) -> None:
    row, kernels = FORMATS[name], FORMATS[name].kernels()
    assert row.holds_embeddings == (kernels.select_rows is not None)
    assert row.integer_product == (kernels.integer_product is not None)
    assert (row.bitsandbytes == "4bit") == (kernels.code_values is not None)


def test_choices_are_written_as_a_sentence_has_them() -> None:
    assert either("a") == "a" and either("a", "b") == "a or b" and either("a", "b", "c") == "a, b or c"
