"""Tests of memory reports as text and JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_lite.memory.breakdown import Category, MemoryBreakdown
from qlora_lite.memory.report import (
    MemoryReport,
    PhaseMemory,
    Timeline,
    axis_ticks,
    peak_sentence,
    readable_bytes,
    render,
    unit_for,
)

MIB = 1 << 20
SPLIT = MemoryBreakdown(
    {
        (Category.BASE_WEIGHT, "layers.0"): 64 * MIB,
        (Category.BASE_WEIGHT, "layers.1"): 32 * MIB,
        (Category.QUANT_STATE, "layers.0"): 3 * MIB // 2,
        (Category.ADAPTER, "layers.0"): 8 * MIB,
        (Category.GRADIENT, "layers.0"): 8 * MIB,
        (Category.OPTIMIZER_STATE, "layers.0"): 16 * MIB,
        (Category.ACTIVATION, None): 1000 * MIB,
        (Category.TEMPORARY, None): 100 * MIB,
        (Category.OTHER, None): MIB // 10,
    }
)
LOAD = PhaseMemory("load", 1, seconds=2.25, resident_start=100 * MIB, resident_end=300 * MIB, resident_peak=400 * MIB)
BACKWARD = PhaseMemory("backward", 200, seconds=1234.5, live_peak=SPLIT.total(), breakdown=SPLIT)


def test_a_traced_run_as_a_table() -> None:
    expected = """\
                            peak    peak    base quant.                    optimizer activa- tempo-
phase    times  seconds resident tensors weights  state adapters gradients     state   tions raries other
─────────────────────────────────────────────────────────────────────────────────────────────────────────
load         1     2.25    400.0       -       -      -        -         -         -       -      -     -
backward   200 1,234.50        - 1,229.6    96.0    1.5      8.0       8.0      16.0 1,000.0  100.0   0.1
sizes in MiB; - is not measured
at the peak, in backward, 1,229.6 MiB of tensors were alive: activations 1,000.0, temporaries 100.0, base weights 96.0,
optimizer state 16.0, adapters 8.0, gradients 8.0, quantization state 1.5, other 0.1
"""
    assert render(MemoryReport((LOAD, BACKWARD))) == expected


def test_counters_alone_as_a_table() -> None:
    expected = """\
                        peak
phase times seconds resident
────────────────────────────
load      1    2.25    400.0
sizes in MiB
"""
    assert render(MemoryReport((LOAD,))) == expected


def test_an_accelerator_as_a_table() -> None:
    step = PhaseMemory("[bold]", 3, seconds=0.5, resident_peak=1, allocated_peak=20 << 30, reserved_peak=24 << 30)
    expected = """\
                          peak     peak
phase  times seconds allocated reserved
───────────────────────────────────────
[bold]     3    0.50     20.00    24.00
sizes in GiB
"""
    assert render(MemoryReport((step,))) == expected


def test_a_narrow_table_folds_and_loses_nothing() -> None:
    narrow = render(MemoryReport((LOAD, BACKWARD)), width=70)
    assert all(len(line) <= 70 for line in narrow.splitlines())
    assert "…" not in narrow


def test_small_runs_are_written_in_kib() -> None:
    step = PhaseMemory("step", 1, seconds=0.0, resident_peak=1536)
    assert render(MemoryReport((step,))).splitlines()[-2:] == ["step      1    0.00      1.5", "sizes in KiB"]


def test_a_predicted_report_has_no_seconds() -> None:
    assert render(MemoryReport((PhaseMemory("step", 1),))).splitlines()[-2:] == [
        "step      1       -        -",
        "sizes in KiB; - is not measured",
    ]


def test_a_table_says_how_often_a_phase_was_traced() -> None:
    counted = PhaseMemory("answers", 1, seconds=1.0, resident_peak=MIB)
    step = PhaseMemory("step", 70, seconds=1.0, resident_peak=MIB, live_peak=1024, breakdown=SPLIT, traced_entries=3)
    wanted = "; tensors are those of the first 3 times of a phase"
    assert wanted in render(MemoryReport((counted, step)), width=100)
    assert wanted not in render(MemoryReport((counted, replace(step, entries=3))), width=100)


def test_no_phase_at_all() -> None:
    assert render(MemoryReport(())) == "no phase was entered\n"


def test_the_peak_in_words() -> None:
    small = MemoryBreakdown({(Category.OTHER, None): 1536})
    phases = (PhaseMemory("a", 1, live_peak=1536, breakdown=small, peak_in="layers.21.mlp"), PhaseMemory("b", 1))
    assert peak_sentence(MemoryReport(phases, rehearsed=True)) == (
        "at the peak, in a of layers.21.mlp, 1.5 KiB of tensors would be alive: other 1.5"
    )
    assert peak_sentence(MemoryReport((PhaseMemory("a", 1, live_peak=2048),))) == (
        "at the peak, in a, 2.0 KiB of tensors were alive"
    )
    assert peak_sentence(MemoryReport((LOAD,))) is None and peak_sentence(MemoryReport(())) is None


def test_of_equal_peaks_the_timeline_knows_the_first() -> None:
    outer, inner, later = (replace(BACKWARD, name=name) for name in ("step", "forward", "backward"))
    lower = PhaseMemory("optimizer", 1, live_peak=BACKWARD.live_peak - 1)
    timeline = Timeline((None, "step", "forward", "backward"), {Category.OTHER: (1, 2, 3, 3)})
    report = MemoryReport((outer, inner, later, lower), timeline=timeline)
    assert report.peak_phase() is inner
    assert replace(report, timeline=None).peak_phase() is later


def test_a_timeline_by_phase() -> None:
    timeline = Timeline(("a", "a", None, "a"), {Category.OTHER: (1, 2, 3, 4), Category.ADAPTER: (10, 20, 30, 40)})
    assert timeline.totals() == (11, 22, 33, 44)
    assert list(timeline.spans()) == [("a", 0, 2), (None, 2, 3), ("a", 3, 4)]
    assert list(Timeline((), {}).spans()) == [] and Timeline((), {}).totals() == ()


def test_differences_of_counters() -> None:
    phase = PhaseMemory("step", 1, resident_peak=50, live_peak=30, allocated_peak=7, reserved_peak=10)
    assert (phase.outside_tensors, phase.fragmentation) == (20, 3)
    assert replace(phase, resident_peak=None).outside_tensors is None
    assert replace(phase, allocated_peak=None).fragmentation is None


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0.0 KiB"),
        (10 * MIB, "10.0 MiB"),
        (10 * MIB - 1, "10,240.0 KiB"),
        (20 << 30, "20.00 GiB"),
        (-20 << 30, "-20.00 GiB"),
        (-1, "0.0 KiB"),
    ],
)
def test_a_size_in_the_unit_that_suits_it(size: int, text: str) -> None:
    assert readable_bytes(size) == text


@pytest.mark.parametrize(
    ("largest", "labels"),
    [
        (229 * MIB, ["0", "50 MiB", "100 MiB", "150 MiB", "200 MiB"]),
        (11 << 30, ["0", "5 GiB", "10 GiB"]),
        (5 * MIB, ["0", "2,000 KiB", "4,000 KiB"]),
        (1536, ["0", "0.5 KiB", "1.0 KiB", "1.5 KiB"]),
        (0, ["0"]),
    ],
)
def test_ticks_of_an_axis(largest: int, labels: list[str]) -> None:
    assert [label for _, label in axis_ticks(largest)] == labels


@given(st.integers(0, 1 << 50), st.integers(3, 9))
def test_ticks_are_even_few_and_labelled_with_their_size(largest: int, most: int) -> None:
    sizes = [size for size, _ in axis_ticks(largest, most)]
    assert sizes[0] == 0 and sizes[-1] <= largest and len(sizes) <= most + 1
    assert all(abs(after - before - sizes[1]) <= 1 for before, after in pairwise(sizes))
    if largest >= most * 1024:
        assert len(sizes) > most / 2.5 and sizes[-1] >= largest - sizes[1]
    unit = unit_for(largest)
    for size, label in axis_ticks(largest, most)[1:]:
        number, name = label.split()
        assert name == unit[1] and float(number.replace(",", "")) * unit[0] == pytest.approx(size, abs=1)


def test_json_holds_every_field_as_it_is() -> None:
    report = MemoryReport((LOAD, BACKWARD))
    load, backward = json.loads(json.dumps(report.to_json()))["phases"]
    assert load == {
        "name": "load",
        "entries": 1,
        "seconds": 2.25,
        "resident_start": 100 * MIB,
        "resident_end": 300 * MIB,
        "resident_peak": 400 * MIB,
        "allocated_peak": None,
        "reserved_peak": None,
        "live_peak": None,
        "breakdown": None,
        "peak_in": None,
        "traced_entries": None,
    }
    assert MemoryBreakdown.from_json(backward["breakdown"]) == SPLIT
    assert report.phase("load") is LOAD
    assert report.phase("merge") is None
