"""Tests of bytes by category and module."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_lite.errors import ConfigError
from qlora_lite.memory.breakdown import Category, MemoryBreakdown

KEYS = st.tuples(st.sampled_from(Category), st.none() | st.sampled_from(["", "layers.0", "layers.1.mlp"]))
SIZES = st.dictionaries(KEYS, st.integers(-(2**40), 2**40))


@given(SIZES, SIZES)
def test_arithmetic_agrees_with_plain_dicts(left: dict, right: dict) -> None:
    one, other = MemoryBreakdown(left), MemoryBreakdown(right)
    for combined, sign in ((one + other, 1), (one - other, -1)):
        for key in left.keys() | right.keys():
            assert combined.get(key, 0) == left.get(key, 0) + sign * right.get(key, 0)
        assert combined.total() == sum(left.values()) + sign * sum(right.values())
    assert one - one == MemoryBreakdown()
    assert one + other - other == one
    assert dict(one) == {key: size for key, size in left.items() if size}


@given(SIZES)
def test_sums_by_category_and_by_module_are_the_total(sizes: dict) -> None:
    breakdown = MemoryBreakdown(sizes)
    assert list(breakdown.by_category()) == list(Category)
    assert sum(breakdown.by_category().values()) == sum(breakdown.by_module().values()) == breakdown.total()
    largest_first = list(breakdown.by_module().values())
    assert largest_first == sorted(largest_first, reverse=True)


@given(SIZES)
def test_json_round_trip(sizes: dict) -> None:
    breakdown = MemoryBreakdown(sizes)
    again = MemoryBreakdown.from_json(json.loads(json.dumps(breakdown.to_json())))
    assert again == breakdown
    assert hash(again) == hash(breakdown)


def test_json_is_sorted_by_category_and_module() -> None:
    breakdown = MemoryBreakdown(
        {(Category.GRADIENT, "b"): 3, (Category.GRADIENT, "a"): 2, (Category.BASE_WEIGHT, None): 1}
    )
    assert breakdown.to_json() == [
        {"category": "base_weight", "module": None, "bytes": 1},
        {"category": "gradient", "module": "a", "bytes": 2},
        {"category": "gradient", "module": "b", "bytes": 3},
    ]


def test_a_breakdown_is_immutable() -> None:
    sizes = {(Category.ADAPTER, "a"): 8}
    breakdown = MemoryBreakdown(sizes)
    sizes[Category.ADAPTER, "a"] = 9
    assert breakdown[Category.ADAPTER, "a"] == 8
    with pytest.raises(TypeError):
        breakdown[Category.ADAPTER, "a"] = 9  # type: ignore[index]
    with pytest.raises(TypeError):
        breakdown + {(Category.ADAPTER, "a"): 1}  # type: ignore[operator]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({Category.ADAPTER: 1}, "keys of a breakdown are (category, module name or None); got <Category.ADAPTER"),
        (
            {(Category.ADAPTER, 3): 1},
            "keys of a breakdown are (category, module name or None); got (<Category.ADAPTER",
        ),
        ({("weights", None): 1}, "got 'weights'"),
        ({(Category.ADAPTER, None): 1.5}, "bytes must be an int; got 1.5"),
        ({(Category.ADAPTER, None): True}, "bytes must be an int; got True"),
    ],
)
def test_other_keys_and_sizes_are_refused(sizes: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MemoryBreakdown(sizes)
    assert message in str(caught.value)


def test_invalid_rows_are_refused() -> None:
    row = {"category": "adapter", "module": None, "bytes": 1}
    with pytest.raises(ConfigError, match="must have the keys category, module and bytes; got"):
        MemoryBreakdown.from_json([{"category": "adapter", "bytes": 1}])
    with pytest.raises(ConfigError, match="must have one row for each category and module; got 1 twice"):
        MemoryBreakdown.from_json([row, row])
