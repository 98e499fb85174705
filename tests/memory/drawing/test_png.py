"""Tests of the timeline as a PNG."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.drawing.palette import LIGHT
from qlora_lite.memory.drawing.png import DPI, HEIGHT, WIDTH, require_matplotlib, write_chart
from qlora_lite.memory.report import MemoryReport, Timeline

pytest.importorskip("matplotlib")


def pixels(path: Path) -> tuple[tuple[int, int], dict[str, int]]:
    """Returns width and height, and the number of pixels of each colour."""
    import numpy
    from matplotlib.image import imread

    image = (imread(path)[:, :, :3] * 255).round().astype(int)
    values, counts = numpy.unique(image.reshape(-1, 3), axis=0, return_counts=True)
    colours = {"#{:02x}{:02x}{:02x}".format(*value): int(count) for value, count in zip(values, counts, strict=True)}
    return (image.shape[1], image.shape[0]), colours


def test_a_chart_has_its_size_and_the_categories_their_areas(measured: MemoryReport, tmp_path: Path) -> None:
    path = tmp_path / "timeline.png"
    write_chart(path, measured)
    size, colours = pixels(path)
    assert size == (round(WIDTH * DPI), round(HEIGHT * DPI))
    assert measured.timeline is not None
    sums = {key: sum(sizes) for key, sizes in measured.timeline.sizes.items()}
    weights, activations = (colours[LIGHT[key]] / sums[key] for key in (Category.BASE_WEIGHT, Category.ACTIVATION))
    assert weights == pytest.approx(activations, rel=0.03)
    assert LIGHT[Category.GRADIENT] not in colours  # there are none


def test_the_predicted_timeline_is_below(predicted: MemoryReport, measured: MemoryReport, tmp_path: Path) -> None:
    write_chart(tmp_path / "both.png", measured, predicted)
    assert pixels(tmp_path / "both.png")[0] == (round(WIDTH * DPI), round(2 * HEIGHT * DPI))
    write_chart(tmp_path / "one.png", measured, replace(predicted, timeline=None))
    assert pixels(tmp_path / "one.png")[0] == (round(WIDTH * DPI), round(HEIGHT * DPI))


def test_names_are_not_read_as_formulas(measured: MemoryReport, tmp_path: Path) -> None:
    odd = Timeline(("$\\frac$", "a$b"), {Category.OTHER: (1, 2)})
    write_chart(tmp_path / "odd.png", replace(measured, timeline=odd))
    assert (tmp_path / "odd.png").read_bytes().startswith(b"\x89PNG")


def test_a_chart_needs_a_timeline(measured: MemoryReport, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"a chart needs a timeline, and this report has none; measure with MemoryProfiler"
    ):
        write_chart(tmp_path / "timeline.png", replace(measured, timeline=None))
    (tmp_path / "timeline.png").touch()
    with pytest.raises(CheckpointError, match=r"timeline\.png exists"):
        write_chart(tmp_path / "timeline.png", measured)
    assert (tmp_path / "timeline.png").stat().st_size == 0


def test_without_matplotlib_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require_matplotlib()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ConfigError, match=r"a PNG needs matplotlib, which is not installed; run: pip install 'qlora-lite"
    ):
        require_matplotlib()
