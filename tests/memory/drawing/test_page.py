"""Tests of a report as an HTML page."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_lite.errors import CheckpointError
from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.drawing.page import page, write_page
from qlora_lite.memory.report import MemoryReport, PhaseMemory, Timeline

MIB = 1 << 20
ODD_NAME = 'x.<b>&"bold"\''
Read = Callable[[str], Any]


def section(read: Any, heading: str) -> Any:
    return next(part for part in read.all("section") if next(part.all("h2")).text == heading)


def figures(read: Any) -> dict[str, str]:
    return {next(box.all("dt")).text: next(box.all("dd")).text for box in next(read.all("dl")).all("div")}


def test_the_headline_has_phase_module_and_split(measured: MemoryReport, read_html: Read) -> None:
    read = read_html(page(measured, title="<Run> & co"))
    assert next(read.all("title")).text == next(read.all("h1")).text == "<Run> & co"
    headline = next(read.all("p", "headline"))
    peak = measured.phases[1]
    assert peak.breakdown is not None and headline.sizes() == [peak.live_peak]
    assert headline.text.split("\n") == [
        "134.3 MiB",
        f"of tensors were alive at the peak, in back<ward> of {ODD_NAME}",
    ]
    parts = next(read.all("ul", "parts"))
    assert [part.text for part in parts.all("li")] == [
        "base weights64.0 MiB47.6 %",
        "adapters1.3 MiB1.0 %",
        "activations60.0 MiB44.7 %",
        "temporaries8.0 MiB6.0 %",
        "other1.0 MiB0.7 %",
    ]
    assert parts.sizes() == [size for size in peak.breakdown.by_category().values() if size]
    assert figures(read) == {
        "peak resident": "460.0 MiBin export",
        "rest of the process": "325.7 MiBpeak resident − peak tensors",
    }


def test_an_accelerator_needs_its_context_too(on_device: MemoryReport, read_html: Read) -> None:
    read = read_html(page(on_device))
    assert next(read.all("p", "headline")).text.split("\n") == [
        "1,000.0 MiB",
        "peak reserved, in step; storages were not traced, so the split by category is unknown",
    ]
    assert figures(read) == {
        "the device needs": "1,300.0 MiBreserved and context",
        "peak allocated": "900.0 MiBin step",
        "peak reserved": "1,000.0 MiBin step",
        "fragmentation": "100.0 MiBpeak reserved − peak allocated",
        "context": "300.0 MiBof the device, outside its allocator",
    }
    kept = replace(on_device, phases=(*on_device.phases, replace(on_device.phases[1], name="export", allocated_peak=0)))
    assert figures(read_html(page(kept))) == figures(read)
    unknown = figures(read_html(page(replace(on_device, context_bytes=None))))
    assert unknown["the device needs"] == "unknownreserved and context" and unknown["context"].startswith("unknown")


def test_unknown_values_are_shown_as_unknown(read_html: Read) -> None:
    read = read_html(page(MemoryReport((PhaseMemory("step", 1),))))
    assert next(read.all("p", "headline")).text.startswith("unknown\npeak resident")
    assert figures(read) == {
        "peak resident": "unknown",
        "rest of the process": "unknownpeak resident − peak tensors",
    }
    for heading in ("Over time", "By module at the peak"):
        found = section(read, heading)
        assert found.text.endswith(": storages were not traced.") and not list(found.all("svg"))
    assert section(read, "By phase").rows()[1] == ["step", "1", "-", "-", "-"] and not read.sizes()
    assert "No phase was entered." in section(read_html(page(MemoryReport(()))), "By phase").text


def test_a_rehearsed_report_is_marked(predicted: MemoryReport, measured: MemoryReport, read_html: Read) -> None:
    read = read_html(page(predicted))
    assert next(read.all("span", "badge")).text == "rehearsed: predicted, not measured"
    assert "would be alive" in next(read.all("p", "headline")).text
    assert next(read_html(page(measured)).all("span", "badge")).text == "measured"


def test_both_timelines_have_one_scale(predicted: MemoryReport, measured: MemoryReport, read_html: Read) -> None:
    read = read_html(page(measured, predicted))
    over_time = section(read, "Over time")
    assert [figure.text for figure in over_time.all("figcaption")] == ["measured", "predicted"]
    grids = [[grid.attributes["d"] for grid in svg.all("path", "grid")] for svg in over_time.all("svg")]
    assert len(grids) == 4 and grids[0] == grids[2] and grids[1] == grids[3]
    assert "No timeline was predicted." in page(measured, replace(predicted, timeline=None))
    assert "No timeline was measured." in page(replace(measured, timeline=None), predicted)


def test_predicted_and_measured_bars_and_table(
    predicted: MemoryReport, measured: MemoryReport, read_html: Read
) -> None:
    against = section(read_html(page(measured, predicted)), "Predicted and measured")
    bars = [[part.text for part in row.inside] for row in next(against.all("div", "pair")).all("div")]
    assert bars == [
        ["predicted", "", "118.3 MiB"],
        ["measured", "", "114.3 MiB"],
        ["predicted", "", "131.3 MiB"],
        ["measured", "", "134.3 MiB"],
        ["predicted", "unknown"],
        ["measured", "unknown"],
    ]
    widths = [
        sum(float(part.attributes["style"][len("width:") : -1]) for part in bar.all("i"))
        for bar in next(against.all("div", "pair")).all("span", "bar")
    ]
    assert widths == [pytest.approx(size / 134.3 * 100, abs=0.1) for size in (118.3, 114.3, 131.3, 134.3)]
    assert len(list(against.all("table", "comparison"))) == 1
    counted = replace(measured, phases=(measured.phases[2],))
    assert "Storages were traced in neither run." in page(counted, counted)


def test_the_page_needs_nothing_and_runs_nothing(
    predicted: MemoryReport, measured: MemoryReport, read_html: Read
) -> None:
    text = page(measured, predicted, title="<script>alert(1)</script>")
    read = read_html(text)
    tags = {tag for tag in ("script", "link", "img", "iframe", "object", "use", "image", "a") if list(read.all(tag))}
    assert not tags and "url(" not in text and "@import" not in text and "http" not in text.replace("http-equiv", "")
    assert "<b>&" not in text.replace("&lt;b&gt;", "") and "back<ward>" not in text
    policy = next(meta for meta in read.all("meta") if "http-equiv" in meta.attributes).attributes["content"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert all(svg.attributes["aria-label"] and svg.attributes["role"] == "img" for svg in read.all("svg"))
    assert next(read.all("html")).attributes["lang"] == "en"
    assert all(list(found.all("caption")) and list(found.all("thead")) for found in read.all("table"))


def test_every_class_of_the_style_sheet_is_used(
    predicted: MemoryReport, measured: MemoryReport, on_device: MemoryReport, read_html: Read
) -> None:
    text = page(measured, predicted)
    style = next(read_html(text).all("style")).text
    styled = set(re.findall(r"\.([a-z][\w-]*)", re.sub(r"\{[^{}]*\}", "{}", style)))
    text += page(predicted) + page(on_device)
    used = {word for names in re.findall(r'class="([^"]*)"', text) for word in names.split()}
    categories = {key.value for key in Category}
    allowed = categories | {f"on-{name}" for name in categories}
    assert styled - allowed - used == set()
    assert styled >= allowed and used >= {"adapter", "phase", "block"}


def test_odd_timelines_make_a_page(measured: MemoryReport, read_html: Read) -> None:
    for timeline in (
        Timeline((), {}),
        Timeline((None,), {Category.OTHER: (0,)}),
        Timeline(("a",) * 3, {Category.ADAPTER: (1, 0, 2)}),
    ):
        assert read_html(page(replace(measured, timeline=timeline))).text


def test_a_page_is_written_whole_and_no_file_is_lost(measured: MemoryReport, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_page(path, measured)
    assert path.read_text(encoding="utf-8") == page(measured)
    with pytest.raises(CheckpointError, match=r"report\.html exists; name another file, or ask for overwrite"):
        write_page(path, measured)
    write_page(path, measured, title="again", overwrite=True)
    assert path.read_text(encoding="utf-8") == page(measured, title="again") and list(tmp_path.iterdir()) == [path]
