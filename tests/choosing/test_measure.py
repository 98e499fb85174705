"""Tests of timing and choosing, by a clock that is told how long everything takes."""

from __future__ import annotations

import pytest
import torch

from qlora_lite.choices import ATTENTION_FORWARD, DEFAULTS, INTEGER_PRODUCTS
from qlora_lite.choosing.measure import (
    KEY_SECONDS,
    LEAST_TURNS,
    MOST_SECONDS,
    MOST_TURNS,
    Clocks,
    fastest,
    fastest_of_all,
    measure,
)
from qlora_lite.choosing.timed_work import Work

FORWARD = f"{ATTENTION_FORWARD}.bf16.short"


class Clock:
    """Time that passes only in `taking`; this thread computes in a share of it."""

    def __init__(self, share: float = 1.0) -> None:
        self.seconds, self.turns = 0.0, 0
        self.clocks = Clocks(lambda: self.seconds, lambda: self.seconds * share)

    def taking(self, *seconds: float) -> Work:
        """A function that takes the first time in its first call, the second in its second, the last in all later."""
        left = list(seconds)

        def work() -> None:
            self.turns += 1
            self.seconds += left.pop(0) if len(left) > 1 else left[0]

        return work


@pytest.mark.parametrize(
    ("ours", "torchs", "expected"),
    [(1.0, 0.5, "torch"), (1.0, 0.89, "torch"), (1.0, 0.91, "ours"), (1.0, 1.0, "ours"), (0.5, 1.0, "ours")],
)
def test_the_default_stays_unless_another_is_clearly_faster(ours: float, torchs: float, expected: str) -> None:
    assert fastest({"ours": ours, "torch": torchs}) == expected


def test_the_shortest_time_counts_and_the_first_turn_does_not() -> None:
    clock = Clock()
    works = {"large_products": clock.taking(0.001, 0.04, 0.02), "torch": clock.taking(0.9, 0.01, 0.03)}
    seconds = measure("bf16", [(FORWARD, works)], clock.clocks)
    assert seconds is not None and clock.turns == 2 * LEAST_TURNS
    assert seconds[FORWARD] == pytest.approx({"large_products": 0.02, "torch": 0.01})
    choices = fastest_of_all(seconds)
    assert choices == {**DEFAULTS, FORWARD: "torch"}


@pytest.mark.parametrize(("each", "turns"), [(1e-6, MOST_TURNS), (KEY_SECONDS / 8, 5), (KEY_SECONDS, LEAST_TURNS)])
def test_short_work_has_more_turns(each: float, turns: int) -> None:
    clock = Clock()
    works = {"int_mm": clock.taking(each), "fp32": clock.taking(each)}
    assert measure("bf16", [(INTEGER_PRODUCTS, works)], clock.clocks) is not None
    assert clock.turns == 2 * turns


def test_a_machine_without_time_for_it_gives_no_times() -> None:
    late = Clock()
    works = {"int_mm": late.taking(MOST_SECONDS / 2), "fp32": late.taking(MOST_SECONDS)}
    assert measure("bf16", [(INTEGER_PRODUCTS, works)], late.clocks) is None and late.turns == 2
    waiting = Clock(share=0.5)
    works = {"int_mm": waiting.taking(0.01), "fp32": waiting.taking(0.01)}
    assert measure("bf16", [(INTEGER_PRODUCTS, works)], waiting.clocks) is None


def test_real_work_is_timed_without_a_trace_in_any_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_lite.choosing import timed_work
    from qlora_lite.planning.rehearsal import rehearsal

    small: dict[str, tuple[int, int]] = {"short": (1, 4), "medium": (1, 8), "long": (1, 12)}
    monkeypatch.setattr(timed_work, "ATTENTION", small)

    def still() -> float:
        return 0.0

    state = torch.get_rng_state()
    with rehearsal() as profiler, profiler.phase("step"), torch.inference_mode():
        seconds = measure("fp32", clocks=Clocks(still, still))
    assert seconds is not None and torch.equal(state, torch.get_rng_state())
    assert {key for key in DEFAULTS if ".bf16." not in key} == set(seconds)
    assert profiler.report().phases[0].live_peak == 0
