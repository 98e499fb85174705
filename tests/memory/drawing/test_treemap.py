"""Tests of the treemap layout."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_lite.errors import ConfigError
from qlora_lite.memory.breakdown import Category, MemoryBreakdown
from qlora_lite.memory.drawing.treemap import Rectangle, Tile, even_rows, group_repeated, pattern, squarify, tiles

PLACE = Rectangle(10, 20, 300, 200)
SIZES = st.lists(st.integers(1, 1 << 36), min_size=1, max_size=40)
PATHS = st.sampled_from(
    [None, "", "head", "model", "model.norm"]
    + [f"model.layers.{n}{rest}" for n in range(4) for rest in ("", ".mlp.up", ".mlp.up.base_layer", ".attn.q")]
)
BREAKDOWNS = st.dictionaries(st.tuples(st.sampled_from(list(Category)), PATHS), st.integers(1, 1 << 36), min_size=1)


def area(place: Rectangle) -> float:
    return place.width * place.height


def check_tiling(places: list[Rectangle], sizes: list[int], whole: Rectangle) -> None:
    """Checks that areas are proportional to sizes, inside the whole, and do not overlap, so they cover it."""
    slack = 1e-6
    for place, size in zip(places, sizes, strict=True):
        assert area(place) == pytest.approx(area(whole) * size / sum(sizes), rel=1e-5, abs=1e-9)
        assert place.x >= whole.x - slack and place.x + place.width <= whole.x + whole.width + slack
        assert place.y >= whole.y - slack and place.y + place.height <= whole.y + whole.height + slack
    for number, one in enumerate(places):
        for other in places[:number]:
            wide = min(one.x + one.width, other.x + other.width) - max(one.x, other.x)
            high = min(one.y + one.height, other.y + other.height) - max(one.y, other.y)
            assert wide <= slack or high <= slack


@given(SIZES, st.sampled_from([squarify, even_rows]), st.floats(1, 2000), st.floats(1, 2000))
def test_rectangles_tile_their_area(sizes: list[int], lay: object, width: float, height: float) -> None:
    whole = Rectangle(-5, 7, width, height)
    check_tiling(lay(sizes, whole), sizes, whole)  # type: ignore[operator]


def test_the_example_of_the_paper() -> None:
    """Bruls, Huizing, van Wijk 2000: areas of 6, 6, 4, 3, 2, 2, 1 in 6 x 4."""
    made = squarify([6, 6, 4, 3, 2, 2, 1], Rectangle(0, 0, 6, 4))
    sides = [(place.x, place.y, place.width, place.height) for place in made]
    expected = [
        (0, 0, 3, 2),
        (0, 2, 3, 2),
        (3, 0, 12 / 7, 7 / 3),
        (3 + 12 / 7, 0, 9 / 7, 7 / 3),
        (3, 7 / 3, 6 / 5, 5 / 3),
        (3 + 6 / 5, 7 / 3, 6 / 5, 5 / 3),
        (3 + 12 / 5, 7 / 3, 3 / 5, 5 / 3),
    ]
    assert sides == [pytest.approx(place) for place in expected]


def test_equal_blocks_are_in_even_rows_in_their_order() -> None:
    made = even_rows([7] * 12, Rectangle(0, 0, 400, 300))
    assert [(place.x, place.y) for place in made] == [
        pytest.approx((100 * column, 100 * row)) for row in range(3) for column in range(4)
    ]
    assert len({round(place.y) for place in even_rows([7] * 31, Rectangle(0, 0, 640, 320))}) == 4


@given(BREAKDOWNS, st.floats(0, 400))
def test_tiles_show_every_byte_once(sizes: dict[tuple[Category, str | None], int], smallest: float) -> None:
    breakdown = MemoryBreakdown(sizes)
    found = list(tiles(breakdown, PLACE, smallest))
    leaves = [tile for tile in found if tile.category is not None]
    check_tiling([tile.rectangle for tile in leaves], [tile.size for tile in leaves], PLACE)
    sums = dict.fromkeys(Category, 0)
    for tile in leaves:
        sums[tile.category] += tile.size
    assert sums == breakdown.by_category() and sum(tile.size for tile in leaves) == breakdown.total()
    for group in (tile for tile in found if tile.category is None):
        assert area(group.rectangle) == pytest.approx(area(PLACE) * group.size / breakdown.total(), rel=1e-5)
        below = {"": lambda path: True, "no module": lambda path: path is None}.get(
            group.path, lambda path, group=group: f"{path}.".startswith(f"{group.path}.")
        )
        assert group.size == sum(size for (_, path), size in breakdown.items() if below(path))


def blocks(smallest: float) -> list[Tile]:
    sizes = {(Category.BASE_WEIGHT, f"layers.{n}.{name}.base_layer"): 50 for n in range(6) for name in ("mlp", "attn")}
    sizes |= {(Category.ADAPTER, f"layers.{n}.mlp"): 10 for n in range(6)}
    sizes[Category.TEMPORARY, "layers.4.attn"] = 200
    sizes[Category.ACTIVATION, None] = 100
    return list(tiles(MemoryBreakdown(sizes), PLACE, smallest))


def test_blocks_look_alike() -> None:
    groups = [tile for tile in blocks(0) if tile.category is None]
    names = [tile.path for tile in groups if tile.path.startswith("layers.") and tile.path.count(".") == 1]
    assert names == [f"layers.{n}" for n in range(6)]
    inner = [tile.path.rpartition(".")[2] for tile in groups if tile.path.count(".") == 2]
    assert inner == ["attn", "mlp"] * 6  # larger over all blocks, although in most of them it is smaller
    assert not any("base_layer" in tile.path for tile in groups)


def test_small_blocks_are_split_by_category_all_alike() -> None:
    middle = sorted(
        min(tile.rectangle.width, tile.rectangle.height)
        for tile in blocks(0)
        if tile.category is None and tile.path.count(".") == 1
    )[2]
    for smallest, split in ((middle * 0.99, True), (middle * 1.01, False)):
        groups = [tile for tile in blocks(smallest) if tile.category is None and tile.path.count(".") == 1]
        assert [tile.is_split for tile in groups] == [split] * 6


def test_the_path_of_a_repeated_module_leaves_its_number_open() -> None:
    assert pattern("model.layers.31.mlp.experts.7.up") == "model.layers.*.mlp.experts.*.up"
    assert pattern("h2.conv1d.0") == "h2.conv1d.*"
    breakdown = MemoryBreakdown(
        {
            (Category.BASE_WEIGHT, "layers.0.up.base_layer"): 5,
            (Category.ADAPTER, "layers.0.up"): 2,
            (Category.ADAPTER, "layers.1.up"): 2,
            (Category.OTHER, None): 4,
        }
    )
    found = group_repeated(breakdown)
    assert {key: (count, sum(sizes.values())) for key, (count, sizes) in found.items()} == {
        "layers.*.up": (2, 9),
        None: (1, 4),
    }
    assert list(found) == ["layers.*.up", None] and found["layers.*.up"][1][Category.ADAPTER] == 4


def test_a_difference_has_no_area() -> None:
    with pytest.raises(
        ConfigError, match=r"a treemap cannot show sizes below 0; got a breakdown that is a difference of two"
    ):
        list(tiles(MemoryBreakdown({(Category.OTHER, None): -1}), PLACE, 0))
    assert list(tiles(MemoryBreakdown(), PLACE, 0)) == []
