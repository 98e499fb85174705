"""Tests of what is timed: each alternative of each key, on the class of shapes that the key names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_lite.choices import ATTENTION_BACKWARD, ATTENTION_FORWARD, INTEGER_PRODUCTS, NAMES, attention_class, chosen
from qlora_lite.choosing import timed_work
from qlora_lite.compute import cpu_attention
from qlora_lite.quantization import int8_matmul


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_alternative_of_a_dtype_is_timed_with_its_choice_in_force(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []

    def kernels(query: Tensor, value: Tensor) -> Any:
        found = real(query, value)
        shapes = attention_class(dtype, query.shape[2])
        assert query.dtype == timed_work.DTYPES[dtype] and query.shape[1] >= 3 * torch.get_num_threads()
        seen.append((f"{ATTENTION_FORWARD}.{shapes}", found.forward))
        seen.append((f"{ATTENTION_BACKWARD}.{shapes}", found.backward))
        return found

    def sums(codes: Tensor, weight_codes: Tensor) -> Tensor:
        seen.append((INTEGER_PRODUCTS, chosen(INTEGER_PRODUCTS)))
        return real_sums(codes, weight_codes)

    sizes = timed_work.ATTENTION
    assert [attention_class(dtype, tokens) for _, tokens in sizes.values()] == [f"{dtype}.{name}" for name in sizes]
    monkeypatch.setattr(timed_work, "ATTENTION", {"short": (1, 8), "medium": (1, 257), "long": (1, 1025)})
    monkeypatch.setattr(timed_work, "WIDTH", 8)
    real, real_sums = cpu_attention._kernels, int8_matmul._sums
    monkeypatch.setattr(cpu_attention, "_kernels", kernels)
    monkeypatch.setattr(int8_matmul, "_sums", sums)
    keys = []
    for key, works in timed_work.timed_work(dtype):
        assert tuple(works) == NAMES[key]
        keys.append(key)
        before = len(seen)
        results = [work() for work in works.values()]
        called = set(seen[before:])
        assert called <= {(k, name) for k in NAMES for name in NAMES[k]}
        if "backward" not in key:  # their choice was in force in the forward before
            assert {(key, name) for name in NAMES[key]} <= called
        first, second = ((result if isinstance(result, tuple) else (result,)) for result in results)
        for mine, theirs in zip(first, second, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05)
    assert sorted(keys) == sorted(key for key in NAMES if f".{dtype}." in key or "." not in key)
    assert set(seen) == {(key, name) for key in keys for name in NAMES[key]}
