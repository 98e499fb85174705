"""Tests of rehearsed steps against real ones, to the byte."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import _len_torch_dispatch_stack
from torch.utils.checkpoint import checkpoint

from qlora_lite.compute.devices import on_cpu
from qlora_lite.errors import RehearsalError
from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.profiler import MemoryProfiler
from qlora_lite.memory.report import MemoryReport
from qlora_lite.planning.cuda_workspaces import CUBLAS_WORKSPACE
from qlora_lite.planning.rehearsal import rehearsal, rehearse
from qlora_lite.quantization.kernels import bnb


class Blocks(nn.Module):
    def __init__(self, width: int, recomputed: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, 2 * width), nn.GELU()) for _ in range(2))
        self.ends = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(2))
        self.blocks.requires_grad_(False)
        self.recomputed = recomputed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block, end in zip(self.blocks, self.ends, strict=True):
            x = x + end(checkpoint(block, x, use_reentrant=False) if self.recomputed else block(x))
        return x


def training(width: int, rows: int, recomputed: bool) -> Callable[[MemoryProfiler], None]:
    def steps(profiler: MemoryProfiler) -> None:
        model = Blocks(width, recomputed)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        profiler.track(model, optimizer)
        for _ in range(2):
            with profiler.phase("forward"):
                loss = model(torch.randn(rows, width)).square().mean()
            with profiler.phase("backward"):
                loss.backward()
            with profiler.phase("optimizer"):
                # Reads a value, as clipping and checks for NaN do.
                assert bool(torch.stack([end.weight.isfinite().all() for end in model.ends]).all())
                optimizer.step()
                optimizer.zero_grad()

    return steps


def measured(step: Callable[[MemoryProfiler], None]) -> MemoryReport:
    with MemoryProfiler() as profiler, profiler.phase("step"):
        step(profiler)
    return profiler.report()


@settings(max_examples=15)
@given(st.integers(1, 40), st.integers(1, 20), st.booleans())
def test_a_step_takes_the_rehearsed_bytes(width: int, rows: int, recomputed: bool) -> None:
    step = training(width, rows, recomputed)
    before, after = rehearse(step), measured(step)
    assert [phase.name for phase in before.phases] == [phase.name for phase in after.phases]
    for rehearsed, real in zip(before.phases, after.phases, strict=True):
        assert rehearsed.live_peak == real.live_peak
        assert rehearsed.breakdown == real.breakdown
        assert rehearsed.peak_in == real.peak_in
        assert rehearsed.entries == real.entries


def test_only_the_steps_own_storages_count() -> None:
    (phase,) = rehearse(lambda: torch.ones(1000).sum()).phases
    assert phase.name == "step"
    assert phase.live_peak == 1000 * 4 + 4
    assert phase.seconds is phase.resident_peak is phase.allocated_peak is phase.reserved_peak is None


def test_values_read_are_one_and_true() -> None:
    answers = []

    def step() -> None:
        answers.extend([torch.zeros(2).sum().item(), int(torch.zeros(3, dtype=torch.int64).max())])
        answers.append(bool((torch.zeros(2) > 1).all()))

    rehearse(step)
    assert answers == [1.0, 1, True]


def test_a_terabyte_needs_no_memory() -> None:
    def step(profiler: MemoryProfiler) -> None:
        with profiler.phase("product"):
            torch.empty(1 << 19, 1 << 19) @ torch.empty(1 << 19, 2)

    phase = rehearse(step).phase("product")
    assert phase is not None and phase.live_peak == (1 << 40) + 2 * (1 << 22)


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float32])
def test_modules_change_their_dtype_and_stay_the_same_parameters(to: torch.dtype) -> None:
    def step(profiler: MemoryProfiler) -> None:
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        parameters = list(model.parameters())
        model(torch.ones(2, 8)).sum().backward()
        model.to(to)
        model.to(to)  # nothing is left to change
        model.eval()
        with profiler.phase("after"):
            pass
        assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
        assert {tensor.dtype for p in parameters for tensor in (p, p.grad)} == {to}
        assert model[1].running_mean.dtype == to and model[1].num_batches_tracked.dtype == torch.int64
        profiler.track(model)

    before, after = rehearse(step), measured(step)
    rehearsed, real = before.phase("after"), after.phase("after")
    assert rehearsed is not None and real is not None
    assert rehearsed.live_peak == real.live_peak


def test_an_accelerator_has_its_libraries_workspaces() -> None:
    step = training(16, 4, False)
    on_host, on_device = rehearse(step).phases[0], rehearse(step, accelerator=True).phases[0]
    assert on_host.live_peak is not None and on_device.live_peak is not None
    assert on_device.live_peak - on_host.live_peak == 2 * CUBLAS_WORKSPACE
    assert on_device.breakdown is not None
    assert on_device.breakdown.by_category()[Category.OTHER] == 2 * CUBLAS_WORKSPACE


def shapes_by_values() -> None:
    torch.ones(5).nonzero()


def broken() -> None:
    assert isinstance(torch.ones(1), FakeTensor)
    raise KeyError("broken")


@pytest.mark.parametrize(
    ("step", "error", "text"),
    [
        (shapes_by_values, RehearsalError, "cannot be rehearsed: .* depend on values .*nonzero"),
        (broken, KeyError, "broken"),
    ],
)
@pytest.mark.parametrize("accelerator", [False, True])
def test_after_an_error_everything_is_restored(
    step: Callable[[], None], error: type[Exception], text: str, accelerator: bool
) -> None:
    masks = importlib.import_module("transformers.masking_utils")
    is_tracing, apply = masks.is_tracing, nn.Module._apply
    # Not always absent: torch's MemTracker, which other tests use, leaves the inherited method in the class.
    resize = vars(torch.UntypedStorage).get("resize_")
    with pytest.raises(error, match=text):
        rehearse(step, accelerator=accelerator)
    assert masks.is_tracing is is_tracing and nn.Module._apply is apply
    assert _len_torch_dispatch_stack() == 0
    assert not torch_module._global_forward_hooks and not torch_module._global_forward_pre_hooks
    assert vars(torch.UntypedStorage).get("resize_") is resize
    assert on_cpu(torch.device("cpu"))
    assert type(torch.ones(1)) is torch.Tensor


def test_bitsandbytes_keeps_no_fake_table() -> None:
    bnb.name2qmap.pop("dynamic", None)
    rehearse(lambda: bnb.quantize_4bit(torch.empty(64, 64), compress_statistics=True))
    assert type(bnb.name2qmap["dynamic"]) is torch.Tensor
    packed, state = bnb.quantize_4bit(torch.randn(64, 64), compress_statistics=True)
    assert bnb.dequantize_4bit(packed, state).isfinite().all()


def test_the_block_has_a_profiler_and_fake_tensors() -> None:
    with rehearsal() as profiler:
        with profiler.phase("made"):
            kept = torch.ones(10)
        assert isinstance(kept, FakeTensor)
    assert profiler.trace is not None
    assert next(iter(profiler.trace.timeline())).delta == 10 * 4


def test_torch_logs_no_traceback_of_an_operator_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    def split_by_values() -> None:
        torch.ones(92).split([int(size) for size in torch.ones(4).tolist()])

    logger = logging.getLogger("torch._subclasses.fake_tensor")
    monitored, logger.propagate = logger.propagate, True
    try:
        with pytest.raises(RuntimeError, match="split_with_sizes expects split_sizes to sum exactly to 92"):
            rehearse(split_by_values)
    finally:
        logger.propagate = monitored
    assert caplog.records == [] and not logger.disabled
