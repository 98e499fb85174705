"""Tests of plans as text."""

from __future__ import annotations

from dataclasses import replace

from qlora_lite import LoraConfig, QuantConfig
from qlora_lite.memory.breakdown import Category
from qlora_lite.planning.forecast import Forecast, TrainingSetup
from qlora_lite.planning.memory_plan import Alternative, DeviceMemory, LargestBatch, Plan, Recomputation
from qlora_lite.planning.plan_report import render_plan

GIB = 1 << 30
SIZES = dict.fromkeys(Category, 0) | {Category.BASE_WEIGHT: 12 * GIB, Category.ACTIVATION: GIB}
PLAN = Plan(
    setup=TrainingSetup(QuantConfig(), LoraConfig(), 2, 512),
    memory=DeviceMemory(24 * GIB, GIB // 2, True, "assumed"),
    forecast=Forecast(13 * GIB, "backward", "model.layers.0.mlp", SIZES, 12 * GIB, 14 * GIB, (3, 4)),
    needed=29 * GIB // 2,
    least=Recomputation(11 * GIB, 23 * GIB),
    largest=(LargestBatch(512, 3, 16 * GIB, more=False), LargestBatch(8192, 0, None, more=False)),
    alternatives=(Alternative("adamw8bit", -GIB), Alternative("int8 embedding and head", None, "it has no head")),
    rehearsed_whole=False,
)
TEXT = """\
2 x 512 tokens, checkpointing full: fits into 24.00 GiB; needed: 14.50 GiB

at the peak                                    bytes
────────────────────────────────────────────────────
base weights                               12.00 GiB
activations                              1,024.0 MiB
live tensors at the peak                   13.00 GiB
reserved by the allocator beyond these   1,024.0 MiB
context of the device (assumed)            512.0 MiB

The peak is in phase backward, in model.layers.0.mlp.
Least recomputation that fits: checkpointing 11.00 GiB (needs at most 23.00 GiB).

tokens   largest batch (rows)      needed
─────────────────────────────────────────
512                         3   16.00 GiB
8192                        0           -

change                            peak of live tensors
──────────────────────────────────────────────────────
adamw8bit                                 -1,024.0 MiB
int8 embedding and head   not possible: it has no head

Rehearsed with 3 and 4 layers and extrapolated linearly to all layers; a rehearsal of 5 layers
agrees to the byte. The reserved bytes are an estimate. The context is unknown without the device;
set its size with --overhead.
"""


def test_a_plan_as_text() -> None:
    assert render_plan(PLAN) == TEXT
    on_disk = replace(PLAN.forecast, on_disk=GIB, resident_base=GIB // 2, read_a_batch=2 * GIB)  # type: ignore[type-var]
    line = (
        "On disk: 1,024.0 MiB of the base, of which at most 512.0 MiB are resident; a batch reads at most 2,048.0 MiB."
    )
    assert line in render_plan(replace(PLAN, forecast=on_disk))
    assert "does not fit into 12.00 GiB" in render_plan(
        replace(PLAN, memory=DeviceMemory(12 * GIB, 0, accelerator=True))
    )


def test_a_cpu_has_no_allocator_and_no_context() -> None:
    assert PLAN.forecast is not None
    forecast = replace(PLAN.forecast, reserved=None, layers=(32,), module=None)
    said = render_plan(
        replace(PLAN, memory=DeviceMemory(24 * GIB, GIB, False, "measured"), forecast=forecast, rehearsed_whole=True)
    )
    assert "rest of the process (measured)" in said and "reserved" not in said and "context" not in said
    assert "Rehearsed with all layers of the model (32)." in said and "in no module" in said


def test_a_plan_without_a_rehearsal_as_text() -> None:
    counted = {"model": 6 * GIB, "gradients": GIB, "optimizer_state": 2 * GIB}
    plan = replace(
        PLAN,
        forecast=None,
        needed=None,
        least=None,
        largest=(),
        alternatives=(),
        counted=counted,
        not_rehearsed="no kernel",
    )
    said = render_plan(plan)
    assert plan.fits is None and said.startswith("not rehearsed: no kernel\nmodel: 6,144.0 MiB\n")
    assert "at least 9,728.0 MiB needed; whether it fits is unknown" in said
    small = replace(plan, memory=DeviceMemory(9 * GIB, 1, accelerator=True))
    assert small.fits is False and "does not fit into" in render_plan(small)
