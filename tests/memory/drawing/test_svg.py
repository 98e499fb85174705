"""Tests of drawings as SVG."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from qlora_lite.memory.breakdown import Category, MemoryBreakdown
from qlora_lite.memory.drawing.svg import share_bar, timeline_picture, treemap_picture, truncated
from qlora_lite.memory.report import MemoryReport, Timeline, readable_bytes

MIB = 1 << 20
ODD_NAME = 'x.<b>&"bold"\''
Read = Callable[[str], Any]
COLOURS = {category.value for category in Category}


def corners(path: Any) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"([\d.]+),([\d.]+)", path.attributes["d"])]


def area(points: list[tuple[float, float]]) -> float:
    """Returns the area of a polygon, by the shoelace formula."""
    after = [*points[1:], points[0]]
    return abs(sum(x * v - u * y for (x, y), (u, v) in zip(points, after, strict=True))) / 2


def test_each_category_covers_its_bytes(measured: MemoryReport, read_html: Read) -> None:
    timeline = measured.timeline
    assert timeline is not None
    highest = max(timeline.totals())
    picture = read_html(timeline_picture(timeline, highest, 1000, 500, "<t>", tips=False))
    (svg,) = picture.all("svg")
    assert svg.attributes["aria-label"] == "<t>" and svg.attributes["role"] == "img"
    stack = {path.classes[0]: area(corners(path)) for path in picture.all("path") if COLOURS & set(path.classes)}
    expected = {key.value: sum(sizes) for key, sizes in timeline.sizes.items() if any(sizes)}
    assert stack.keys() == expected.keys()
    whole = sum(stack.values())
    for name, size in expected.items():
        assert stack[name] / whole == pytest.approx(size / sum(expected.values()), abs=2e-4)


def test_the_peak_and_the_phases_are_marked(measured: MemoryReport, read_html: Read) -> None:
    timeline = measured.timeline
    assert timeline is not None
    picture = read_html(timeline_picture(timeline, max(timeline.totals()), 1000, 500, "", tips=True))
    (circle,) = picture.all("circle", "peak")
    highest = min(y for path in picture.all("path") if COLOURS & set(path.classes) for _, y in corners(path))
    assert float(circle.attributes["cy"]) == pytest.approx(highest, abs=0.1)
    (label,) = picture.all("text", "peak")
    assert label.text == f"peak {readable_bytes(max(timeline.totals()))}"
    names = [next(phase.all("title")).text for phase in picture.all("g")]
    assert names == ["between phases", "forward", "back<ward>"]
    assert [next(phase.all("text")).text for phase in picture.all("g")] == ["", "forward", "back<ward>"]
    places = [next(phase.all("rect")).attributes for phase in picture.all("g")]
    widths = [float(place["width"]) for place in places]
    assert [round(width / widths[0]) for width in widths] == [1, 3, 3]
    tips = [next(tip.all("title")).text for tip in picture.all("rect", "tip")]
    assert len(tips) == len(timeline)
    assert tips[5].splitlines() == [
        "back<ward>: 134.3 MiB",
        "base weights 64.0 MiB",
        "adapters 1,365.3 KiB",
        "activations 60.0 MiB",
        "temporaries 8,192.0 KiB",
        "other 1,024.0 KiB",
    ]


def test_a_run_of_one_point_and_one_of_none_alive(read_html: Read) -> None:
    one = Timeline(("step",), {Category.OTHER: (5,), Category.ADAPTER: (0,)})
    (path,) = (p for p in read_html(timeline_picture(one, 5, 300, 200, "", False)).all("path") if "other" in p.classes)
    assert area(corners(path)) == pytest.approx((300 - 68 - 8) * (200 - 24 - 24), rel=1e-3)
    nothing = Timeline(("step", "step"), {Category.OTHER: (0, 0)})
    assert not list(read_html(timeline_picture(nothing, 0, 300, 200, "", False)).all("path", "other"))


def test_tiles_are_as_large_as_their_bytes(measured: MemoryReport, read_html: Read) -> None:
    phase = measured.peak_phase()
    assert phase is not None and phase.breakdown is not None
    picture = read_html(treemap_picture(phase.breakdown, 800, 400, "by module"))
    found: dict[str, float] = {}
    for tile in picture.all("rect"):
        if COLOURS & set(tile.classes):
            tip = next(tile.all("title")).text
            size = float(tile.attributes["width"]) * float(tile.attributes["height"])
            found[tip] = size
    expected = {}
    for (category, module), size in phase.breakdown.items():
        name = "no module" if module is None else module.removesuffix(".base_layer")
        words = {"base_weight": "base weights", "adapter": "adapters", "activation": "activations"}
        words |= {"temporary": "temporaries", "other": "other"}
        expected[f"{name}\n{words[category.value]}: {readable_bytes(size)}"] = size
    assert found.keys() == expected.keys()
    for tip, size in expected.items():
        assert found[tip] / 320_000 == pytest.approx(size / phase.breakdown.total(), abs=2e-4)
    texts = [text.text for text in picture.all("text")]
    assert {"layers.0", "layers.3", "mlp"} <= set(texts)
    assert any(ODD_NAME in tip for tip in found)


def test_names_stay_where_their_colour_is(read_html: Read) -> None:
    """A name lies within a tile of the category that its text colour suits."""
    sizes = {(Category.BASE_WEIGHT, f"h.{n}.attention.query"): 90 - n for n in range(12)}
    sizes |= {(Category.ACTIVATION, f"h.{n}"): 40 * n for n in range(1, 12)}
    picture = read_html(treemap_picture(MemoryBreakdown(sizes), 700, 500, ""))
    rects = [rect for rect in picture.all("rect") if COLOURS & set(rect.classes)]
    names = list(picture.all("text"))
    assert len(names) >= 12
    for name in names:
        x, y = float(name.attributes["x"]), float(name.attributes["y"])
        under = [
            rect
            for rect in rects
            if 0 <= x - float(rect.attributes["x"]) < float(rect.attributes["width"])
            and 0 <= y - 5 - float(rect.attributes["y"]) < float(rect.attributes["height"])
        ]
        assert [f"on-{rect.classes[0]}" for rect in under] == [name.classes[1]]
        assert x + 6 * len(name.text) <= float(under[0].attributes["x"]) + float(under[0].attributes["width"]) + 6


@pytest.mark.parametrize(("room", "text"), [(100, "backward"), (40, "backw…"), (26, "bac…"), (20, ""), (-5, "")])
def test_a_name_is_shortened_to_its_room(room: float, text: str) -> None:
    assert truncated("backward", room) == text


def test_a_bar_is_cut_by_share(read_html: Read) -> None:
    bar = read_html(share_bar({Category.ADAPTER: 25, Category.GRADIENT: 0, Category.OTHER: 50}, 100))
    parts = [(part.classes, part.attributes["style"]) for part in bar.all("i")]
    assert parts == [(["adapter"], "width:25.000%"), (["other"], "width:50.000%")]


def test_a_timeline_is_drawn_at_any_size(measured: MemoryReport, read_html: Read) -> None:
    timeline = measured.timeline
    assert timeline is not None
    thin = replace(timeline, phases=("a<b",) * len(timeline))
    for width in (120, 360, 2000):
        assert read_html(timeline_picture(thin, 10**12, width, 200, "", tips=True)).text
