"""Tests of the tables of a page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qlora_lite.memory.breakdown import Category, MemoryBreakdown
from qlora_lite.memory.drawing.tables import (
    Row,
    comparison_table,
    module_table,
    path_html,
    phase_table,
    size_html,
    table,
)
from qlora_lite.memory.report import UNITS, MemoryReport

MIB = 1 << 20
ODD_NAME = 'x.<b>&"bold"\''
Read = Callable[[str], Any]


def test_a_size_has_its_bytes_as_value() -> None:
    assert size_html(MIB * 20) == '<data value="20971520" title="20,971,520 bytes">20.0 MiB</data>'
    assert size_html(0, UNITS[1]) == '<data class="nil" value="0" title="0 bytes">0.0</data>'
    assert size_html(MIB, UNITS[0], is_named=True) == '<data value="1048576" title="1,048,576 bytes">0.00 GiB</data>'
    assert size_html(None) == '<span class="unknown">unknown</span>'
    assert size_html(None, UNITS[0]) == '<span class="unknown" title="unknown">-</span>'


def test_a_path_may_break_after_its_dots(read_html: Read) -> None:
    assert read_html(path_html(ODD_NAME)).text == ODD_NAME and "<wbr>" in path_html(ODD_NAME)


def test_rows_are_in_their_groups(read_html: Read) -> None:
    rows = [Row("a", ["1"]), Row("b", ["2"], "g"), Row("c", ["3"], "g"), Row("d", ["4"], "h")]
    page = read_html("".join(table("k", "what", ("x", "y"), rows)))
    assert page.rows() == [["x", "y"], ["a", "1"], ["g"], ["b", "2"], ["c", "3"], ["h"], ["d", "4"]]
    assert [head.attributes["scope"] for head in page.all("th")] == [
        *("col", "col", "row"),
        *("rowgroup", "row", "row"),
        *("rowgroup", "row"),
    ]
    assert next(page.all("caption")).text == "what"


def test_phases_of_a_process(measured: MemoryReport, read_html: Read) -> None:
    page = read_html("".join(phase_table(measured)))
    assert page.rows() == [
        [
            *("phase", "times", "seconds", "peak resident", "rest of the process", "peak tensors"),
            *("base weights", "adapters", "activations", "temporaries", "other"),
        ],
        ["forward", "2", "1.50", "450.0", "335.7", "114.3", "64.0", "1.3", "40.0", "8.0", "1.0"],
        [f"back<ward>peak in {ODD_NAME}", "2", "3.25", "440.0", "305.7", "134.3", "64.0", "1.3", "60.0", "8.0", "1.0"],
        ["export", "1", "-", "460.0", "-", "-", "-", "-", "-", "-", "-"],
    ]
    assert "sizes in MiB; - is unknown" in next(page.all("caption")).text
    first = measured.phases[0]
    assert first.breakdown is not None
    assert page.sizes()[:8] == [
        *(first.resident_peak, first.outside_tensors, first.live_peak),
        *(size for size in first.breakdown.by_category().values() if size),
    ]


def test_phases_of_an_accelerator(on_device: MemoryReport, read_html: Read) -> None:
    assert read_html("".join(phase_table(on_device))).rows() == [
        ["phase", "times", "seconds", "peak allocated", "peak reserved", "fragmen\u00adtation"],
        ["load", "1", "2.00", "700.0", "704.0", "4.0"],
        ["step", "9", "4.00", "900.0", "1,000.0", "100.0"],
    ]


def test_the_largest_modules(measured: MemoryReport, read_html: Read) -> None:
    breakdown = measured.phases[1].breakdown
    assert breakdown is not None
    page = read_html("".join(module_table(breakdown)))
    assert page.rows() == [
        ["module", "number", "size", "share", ""],
        ["layers.*.mlp", "4", "65.3", "48.6 %", ""],
        ["layers.*", "4", "60.0", "44.7 %", ""],
        [ODD_NAME, "1", "8.0", "6.0 %", ""],
        ["no module", "", "1.0", "0.7 %", ""],
    ]
    assert sum(page.sizes()) == breakdown.total()


def test_small_modules_are_one_row(read_html: Read) -> None:
    sizes = {(Category.BASE_WEIGHT, f"m{letter}"): 1000 for letter in "abcdefghijklmnopqrst"}
    many = MemoryBreakdown({**sizes, (Category.OTHER, "tiny"): 3, (Category.OTHER, None): 2})
    page = read_html("".join(module_table(many)))
    assert len(page.rows()) == 1 + 14 + 1 and page.rows()[-1][:2] == ["all others", "7"]
    assert sum(page.sizes()) == many.total()
    few = MemoryBreakdown({(Category.OTHER, ""): 10_000, (Category.OTHER, "small"): 3})
    assert [row[:2] for row in read_html("".join(module_table(few))).rows()[1:]] == [
        ["the model itself", "1"],
        ["all others", "1"],
    ]


def test_predicted_against_measured(predicted: MemoryReport, measured: MemoryReport, read_html: Read) -> None:
    page = read_html("".join(comparison_table(predicted, measured)))
    assert page.rows() == [
        ["", "predicted", "measured", "difference", "percent"],
        ["forward"],
        ["peak tensors", "118.3", "114.3", "4.0", "+3.5 %"],
        ["base weights", "64.0", "64.0", "0.0", "+0.0 %"],
        ["adapters", "1.3", "1.3", "0.0", "+0.0 %"],
        ["activations", "44.0", "40.0", "4.0", "+10.0 %"],
        ["temporaries", "8.0", "8.0", "0.0", "+0.0 %"],
        ["other", "1.0", "1.0", "0.0", "+0.0 %"],
        ["back<ward>"],
        ["peak tensors", "131.3", "134.3", "-3.0", "-2.2 %"],
        ["base weights", "64.0", "64.0", "0.0", "+0.0 %"],
        ["adapters", "1.3", "1.3", "0.0", "+0.0 %"],
        ["activations", "57.0", "60.0", "-3.0", "-5.0 %"],
        ["temporaries", "8.0", "8.0", "0.0", "+0.0 %"],
        ["other", "1.0", "1.0", "0.0", "+0.0 %"],
    ]
    counted = MemoryReport((measured.phases[2],))
    assert list(comparison_table(predicted, counted)) == []
    assert read_html("".join(comparison_table(counted, counted))).rows()[1:] == [
        ["export"],
        ["peak resident", "460.0", "460.0", "0.0", "+0.0 %"],
    ]
