"""Tests of extrapolating over the number of layers, on made-up runs with known peaks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.trace import TraceEvent
from qlora_lite.planning.layer_extrapolation import (
    AllocationSite,
    absolute_name,
    extrapolate,
    highest_by_site,
    phase_peaks,
)

BASE, TEMPORARY = list(Category).index(Category.BASE_WEIGHT), list(Category).index(Category.TEMPORARY)


def a_run(layers: int, weight: int, loss: int, block: int) -> list[TraceEvent]:
    """Layers of `weight` bytes each; a loss that needs `loss`; a backward pass in which a layer needs `block` and adds
    a gradient of one byte, the last first."""
    events: list[TraceEvent] = []
    live = 0

    def add(phase: str, delta: int, category: Category, module: str | None) -> None:
        nonlocal live
        live += delta
        events.append(TraceEvent(phase, len(events), delta, live, category, module))

    for number in range(layers):
        add("forward", weight, Category.BASE_WEIGHT, f"model.layers.{number}.mlp")
    for delta in (loss, -loss):
        add("forward", delta, Category.TEMPORARY, "lm_head")
    for number in reversed(range(layers)):
        for delta in (block, -block):
            add("backward", delta, Category.TEMPORARY, f"model.layers.{number}.mlp")
        add("backward", 1, Category.GRADIENT, f"model.layers.{number}.mlp")
    return events


@given(st.integers(0, 50), st.integers(1, 500), st.integers(1, 500), st.integers(5, 40))
def test_every_phase_of_a_deep_model_follows_from_two_shallow_ones(
    weight: int, loss: int, block: int, layers: int
) -> None:
    few, more, deep = (highest_by_site(a_run(n, weight, loss, block), n) for n in (3, 4, layers))
    found = phase_peaks(extrapolate(few, more, layers - 3))
    assert {phase: sum(sizes) for phase, (_, sizes) in found.items()} == {
        phase: sum(sizes) for phase, (_, sizes) in phase_peaks(deep).items()
    }


def test_the_peak_may_move_to_another_site() -> None:
    # The loss is the peak of a run of four layers, and with forty it is the first block's backward.
    runs = [highest_by_site(a_run(n, 1, 20, 16), n) for n in (3, 4, 40)]
    assert [max(sum(s) for s in run.values()) for run in runs] == [23, 24, 95]
    place, sizes = phase_peaks(extrapolate(*runs[:2], 37))["backward"]
    assert sum(sizes) == 95 and (sizes[BASE], sizes[TEMPORARY]) == (40, 16)
    assert place == AllocationSite("backward", Category.TEMPORARY, "model.layers.0.mlp")
    assert absolute_name("model.layers.-1.mlp", 40) == "model.layers.39.mlp"
    assert absolute_name("model.layers.0.mlp", 40) == "model.layers.0.mlp" and absolute_name(None, 40) is None


def test_the_start_of_a_phase_is_a_site() -> None:
    events = [
        TraceEvent("forward", 0, 8, 8, Category.OTHER, None),
        TraceEvent("backward", 0, -8, 0, Category.OTHER, None),
    ]
    found = phase_peaks(highest_by_site(events, 3))
    assert found["backward"][0] == AllocationSite("backward", None, None) and sum(found["backward"][1]) == 8
