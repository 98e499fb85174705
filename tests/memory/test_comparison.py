"""Tests of comparing two reports."""

from __future__ import annotations

import pytest

from qlora_lite.memory.breakdown import Category, MemoryBreakdown
from qlora_lite.memory.comparison import SizeComparison, compare, format_percent, render_comparison
from qlora_lite.memory.report import MemoryReport, PhaseMemory

MIB = 1 << 20


def phase(name: str, activations: int, **counters: int) -> PhaseMemory:
    split = MemoryBreakdown(
        {
            (Category.BASE_WEIGHT, "a"): 64 * MIB,
            (Category.BASE_WEIGHT, "b"): 32 * MIB,
            (Category.ACTIVATION, None): activations,
        }
    )
    return PhaseMemory(name, 1, live_peak=split.total(), breakdown=split, **counters)


PREDICTED = MemoryReport((phase("[step]", 110 * MIB), phase("plan", 0)), rehearsed=True)
MEASURED = MemoryReport(
    (
        PhaseMemory("load", 1, resident_peak=300 * MIB, live_peak=50 * MIB),
        phase("[step]", 100 * MIB, resident_peak=500 * MIB),
    )
)


def test_both_reports_as_a_table() -> None:
    expected = """\
phase  bytes of     predicted measured difference percent
─────────────────────────────────────────────────────────
load   peak tensors         -     50.0          -       -
[step] peak tensors     206.0    196.0       10.0  +5.1 %
       base weights      96.0     96.0        0.0  +0.0 %
       activations      110.0    100.0       10.0 +10.0 %
plan   peak tensors      96.0        -          -       -
       base weights      96.0        -          -       -
sizes in MiB; difference is predicted - measured; - is unknown
"""
    assert render_comparison(PREDICTED, MEASURED) == expected


def test_an_accelerator_as_a_table() -> None:
    one = MemoryReport((PhaseMemory("step", 1, allocated_peak=20 << 30, reserved_peak=22 << 30),))
    other = MemoryReport((PhaseMemory("step", 1, allocated_peak=24 << 30, reserved_peak=22 << 30),))
    expected = """\
phase bytes of       predicted measured difference percent
──────────────────────────────────────────────────────────
step  peak allocated     20.00    24.00      -4.00 -16.7 %
      peak reserved      22.00    22.00       0.00  +0.0 %
sizes in GiB; difference is predicted - measured; - is unknown
"""
    assert render_comparison(one, other) == expected


def test_a_narrow_table_folds_and_loses_nothing() -> None:
    narrow = render_comparison(PREDICTED, MEASURED, width=50)
    assert all(len(line) <= 50 for line in narrow.splitlines()[:-1]) and "…" not in narrow


def test_nothing_to_compare() -> None:
    assert render_comparison(MemoryReport(()), MemoryReport((PhaseMemory("load", 1),))) == (
        "no size was both predicted and measured\n"
    )


def test_differences_are_bytes_and_shares_of_what_was_measured() -> None:
    rows = {(row.phase, row.name): row for row in compare(PREDICTED, MEASURED)}
    activations = rows["[step]", "activations"]
    assert (activations.difference, activations.percent) == (10 * MIB, pytest.approx(10))
    assert ("[step]", "gradients") not in rows  # nothing of them in either
    assert SizeComparison("step", "gradients", 5, 0).percent is None
    assert SizeComparison("step", "gradients", None, 5).difference is None


@pytest.mark.parametrize(
    ("percent", "text"), [(None, "-"), (-0.01, "+0.0 %"), (-12.34, "-12.3 %"), (1234.5, "+1,234.5 %")]
)
def test_percent_in_words(percent: float | None, text: str) -> None:
    assert format_percent(percent) == text
