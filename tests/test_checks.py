"""What is said of NaN, infinity and overflow."""

from __future__ import annotations

import pytest
import torch

from qlora_lite.checks import cast_finite, check_finite, check_packable
from qlora_lite.errors import QuantizationError


def test_cast_finite_names_what_does_not_fit() -> None:
    with pytest.raises(QuantizationError, match=r"layer\.weight reaches 70000, above 65504"):
        cast_finite(torch.tensor([1.0, -70000.0]), torch.float16, "layer.weight")
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        cast_finite(torch.tensor([float("nan")]), torch.float16, "layer.weight")


def test_the_first_bad_index_is_named() -> None:
    weight = torch.ones(3, 4)
    assert check_finite(weight, "layer.weight") == 1.0
    weight[1, 2] = float("inf")
    with pytest.raises(QuantizationError, match=r"layer.weight holds inf at index \(1, 2\)"):
        check_finite(weight, "layer.weight")


@pytest.mark.parametrize(
    ("weight", "what"),
    [
        (torch.ones(3), "must be a matrix of floats"),
        (torch.ones(3, 3, dtype=torch.int64), "must be a matrix of floats"),
        (torch.ones(0, 3), "has no values"),
        (torch.full((2, 2), 1e5), "above 65504, the limit of int8 rows"),
    ],
)
def test_what_cannot_be_packed_is_said(weight: torch.Tensor, what: str) -> None:
    with pytest.raises(QuantizationError, match=what):
        check_packable(weight, "layer.weight", "int8")
