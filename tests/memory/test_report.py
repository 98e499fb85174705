from __future__ import annotations

import json

from qlora_lite.memory.breakdown import Category, MemoryBreakdown
from qlora_lite.memory.report import MemoryReport, PhaseMemory, render

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


def test_what_was_predicted_has_no_seconds() -> None:
    assert render(MemoryReport((PhaseMemory("step", 1),))).splitlines()[-2:] == [
        "step      1       -        -",
        "sizes in KiB; - is not measured",
    ]


def test_no_phase_at_all() -> None:
    assert render(MemoryReport(())) == "no phase was entered\n"


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
    }
    assert MemoryBreakdown.from_json(backward["breakdown"]) == SPLIT
    assert report.phase("load") is LOAD
    assert report.phase("merge") is None
