"""Tests of the memory profiler: phases, peaks and categories."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _len_torch_dispatch_stack

from qlora_lite.errors import ConfigError
from qlora_lite.memory import counters
from qlora_lite.memory.breakdown import Category, MemoryBreakdown
from qlora_lite.memory.profiler import MemoryProfiler
from qlora_lite.memory.report import PhaseMemory
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.formats import packed_bytes, statistics_bytes
from qlora_lite.quantization.layers import QuantizedLinear
from qlora_lite.quantization.packed_weight import PackedWeight

FLOAT = 4
MIB = 1 << 20


class Adapted(nn.Module):
    """A frozen packed base, a frozen norm, and a trained pair, as in a quantized model with adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.base = QuantizedLinear(PackedWeight.of(torch.randn(64, 64), QuantConfig(blocksize=64)))
        self.norm = nn.LayerNorm(64).requires_grad_(False)
        self.down = nn.Linear(64, 4, bias=False)
        self.up = nn.Linear(4, 64, bias=False)
        self.up.weight.data.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.base(x) + self.up(self.down(x))


def one_step(profiler: MemoryProfiler, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with profiler.phase("forward"):
        loss = model(torch.randn(8, 64)).square().sum()
    with profiler.phase("backward"):
        loss.backward()
    with profiler.phase("optimizer"):
        optimizer.step()
        optimizer.zero_grad()


def measured(profiler: MemoryProfiler, name: str) -> PhaseMemory:
    phase = profiler.report().phase(name)
    assert phase is not None
    return phase


def split(phase: PhaseMemory) -> MemoryBreakdown:
    assert phase.breakdown is not None
    assert phase.breakdown.total() == phase.live_peak
    return phase.breakdown


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adapted_and_optimizer() -> tuple[Adapted, torch.optim.Optimizer]:
    model = Adapted()
    return model, torch.optim.AdamW(trained_parameters(model))


def two_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> MemoryProfiler:
    """Returns the profiler of two steps."""
    with MemoryProfiler(model, optimizer) as profiler:
        for _ in range(2):
            one_step(profiler, model, optimizer)
    return profiler


def test_a_report_has_the_timeline_of_a_trace() -> None:
    model, optimizer = adapted_and_optimizer()
    profiler = two_steps(model, optimizer)
    report = profiler.report()
    assert report.timeline is not None
    totals = report.timeline.totals()
    for name in ("forward", "backward", "optimizer"):
        shown = [size for size, where in zip(totals, report.timeline.phases, strict=True) if where == name]
        assert max(shown) == measured(profiler, name).live_peak
    highest = report.peak_phase()
    assert highest is not None and highest.name == report.timeline.phases[totals.index(max(totals))]
    with MemoryProfiler(model, optimizer, trace=False) as counting:
        one_step(counting, model, optimizer)
    assert counting.report().timeline is None and counting.report().peak_phase() is None


def test_every_category_of_an_adapted_model_to_the_byte() -> None:
    profiler = two_steps(*adapted_and_optimizer())
    adapter = 2 * 4 * 64 * FLOAT
    norm = 2 * 64 * FLOAT
    for name in ("forward", "backward", "optimizer"):
        held = split(measured(profiler, name)).by_category()
        assert held[Category.BASE_WEIGHT] == packed_bytes((64, 64), "nf4") + norm
        assert held[Category.QUANT_STATE] == statistics_bytes((64, 64), "nf4", 64, True)
        assert held[Category.ADAPTER] == adapter
        assert held[Category.OTHER] == 0
    step_counts = 2 * FLOAT
    # The largest entry counts: from the second step on, the states live through forward and backward.
    assert split(measured(profiler, "forward")).by_category()[Category.OPTIMIZER_STATE] == 2 * adapter + step_counts
    assert split(measured(profiler, "optimizer")).by_category()[Category.OPTIMIZER_STATE] == 2 * adapter + step_counts
    # zero_grad frees gradients before the phase ends; they are labelled nevertheless.
    assert split(measured(profiler, "optimizer")).by_category()[Category.GRADIENT] == adapter


def test_a_gradient_freed_within_its_phase_is_labelled() -> None:
    model = nn.Linear(64, 64, bias=False)
    with MemoryProfiler(model) as profiler, profiler.phase("backward"):
        model(torch.ones(1, 64)).sum().backward()
        model.zero_grad()
    assert split(measured(profiler, "backward"))[Category.GRADIENT, ""] == 64 * 64 * FLOAT


def test_bytes_belong_to_the_layer_that_holds_them() -> None:
    model = nn.Sequential(Adapted(), Adapted())
    optimizer = torch.optim.AdamW(trained_parameters(model))
    with MemoryProfiler(model, optimizer) as profiler:
        one_step(profiler, model, optimizer)
    held = split(measured(profiler, "optimizer"))
    assert held[Category.QUANT_STATE, "1.base"] == statistics_bytes((64, 64), "nf4", 64, True)
    assert held[Category.BASE_WEIGHT, "1.base"] == packed_bytes((64, 64), "nf4")
    for layer in ("0.down", "0.up", "1.down", "1.up"):
        assert held[Category.ADAPTER, layer] == held[Category.GRADIENT, layer] == 4 * 64 * FLOAT
        assert held[Category.OPTIMIZER_STATE, layer] == 2 * 4 * 64 * FLOAT + FLOAT


def test_a_tied_weight_counts_once_under_its_first_name() -> None:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)).requires_grad_(False)
    model[1].weight = model[0].weight
    with MemoryProfiler(model) as profiler, profiler.phase("forward"):
        pass
    assert dict(split(measured(profiler, "forward"))) == {(Category.BASE_WEIGHT, "0"): 50 * 8 * FLOAT}


def test_a_model_that_is_made_in_a_phase_is_labelled_from_its_first_byte_on() -> None:
    with MemoryProfiler() as profiler:
        with profiler.phase("load"):
            model = nn.Linear(32, 32, bias=False).requires_grad_(False)
            torch.zeros(16)
        profiler.track(model=model)
    assert split(measured(profiler, "load")).by_category() == {
        **dict.fromkeys(Category, 0),
        Category.BASE_WEIGHT: 32 * 32 * FLOAT,
        Category.TEMPORARY: 16 * FLOAT,
    }


def hooks_of(model: nn.Module) -> int:
    return sum(len(parameter._post_accumulate_grad_hooks or ()) for parameter in model.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_restored(fails: bool) -> None:
    model = Adapted()
    own_hook = model.up.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    optimizer = torch.optim.AdamW(trained_parameters(model))
    depth, resize = _len_torch_dispatch_stack(), vars(torch.UntypedStorage).get("resize_")
    outer, inner = MemoryProfiler(model, optimizer), MemoryProfiler(model, optimizer)
    for _ in range(2):
        try:
            with outer, outer.phase("all"), inner:
                assert hooks_of(model) == 5
                one_step(inner, model, optimizer)
                if fails:
                    raise KeyError("stop")
        except KeyError:
            assert fails
        assert hooks_of(model) == 1
        assert _len_torch_dispatch_stack() == depth
        assert vars(torch.UntypedStorage).get("resize_") is resize
        assert counters._open_peaks == []
        assert [phase.entries for phase in inner.report().phases] == [1, 1, 1]
    own_hook.remove()


def test_the_profiler_keeps_nothing_alive() -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters())
    with MemoryProfiler(model, optimizer) as profiler:
        with profiler.phase("step"):
            model(torch.ones(1, 4)).sum().backward()
        weight = weakref.ref(model.weight.untyped_storage())
    del model, optimizer
    gc.collect()
    assert weight() is None
    assert measured(profiler, "step").entries == 1


def test_phases_need_an_open_profiler_and_a_profiler_opens_once() -> None:
    profiler = MemoryProfiler()
    with pytest.raises(ConfigError, match="phase 'load' was entered outside"), profiler.phase("load"):
        pass
    with profiler, pytest.raises(ConfigError, match="already open"):
        profiler.__enter__()


def test_without_a_trace_nothing_is_hooked() -> None:
    model, optimizer = adapted_and_optimizer()
    with MemoryProfiler(model, optimizer, trace=False) as profiler:
        assert _len_torch_dispatch_stack() == 0
        assert hooks_of(model) == 0
        for _ in range(3):
            one_step(profiler, model, optimizer)
    phases = profiler.report().phases
    assert [(phase.name, phase.entries) for phase in phases] == [("forward", 3), ("backward", 3), ("optimizer", 3)]
    assert all(phase.live_peak is None and phase.breakdown is None for phase in phases)
    assert all(phase.seconds is not None and phase.seconds > 0 for phase in phases)
    assert profiler.trace is None


def test_a_phase_is_traced_as_often_as_asked_and_then_counted() -> None:
    whole = two_steps(*adapted_and_optimizer())
    model, optimizer = adapted_and_optimizer()
    with MemoryProfiler(model, optimizer, traced_entries=2) as profiler:
        for _ in range(5):
            one_step(profiler, model, optimizer)
        events = len(list(profiler.trace.timeline()))  # type: ignore[union-attr]
        one_step(profiler, model, optimizer)
        assert len(list(profiler.trace.timeline())) == events  # type: ignore[union-attr]
        assert _len_torch_dispatch_stack() == 1
        with profiler.phase("later"):
            model(torch.randn(8, 64))
    for name in ("forward", "backward", "optimizer"):
        limited = measured(profiler, name)
        assert (limited.entries, limited.traced_entries, measured(whole, name).traced_entries) == (6, 2, 2)
        assert limited.live_peak == measured(whole, name).live_peak
        assert split(limited) == split(measured(whole, name))
        assert limited.seconds is not None and limited.resident_peak is not None
    # Storages that were traced before are followed through the pause, so the last phase has what is alive.
    later = split(measured(profiler, "later")).by_category()
    assert later[Category.OPTIMIZER_STATE] == 2 * 2 * 4 * 64 * FLOAT + 2 * FLOAT and later[Category.GRADIENT] == 0
    assert later[Category.OTHER] == 0
    with pytest.raises(ConfigError, match=r"traced_entries must be None or an integer of at least 1; got 0"):
        MemoryProfiler(traced_entries=0)


def test_an_untraced_phase_is_counted_alone() -> None:
    class Passed(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            return func(*args, **(kwargs or {}))

    with MemoryProfiler() as profiler:
        kept = torch.ones(256)
        with profiler.phase("untraced", trace=False):
            assert _len_torch_dispatch_stack() == 0
            with profiler.phase("inner"):
                made = torch.ones(1024)
            del kept
        # A mode that was entered after the profiler's stays on top of it.
        with Passed(), profiler.phase("below another", trace=False):
            torch.ones(1024)
            assert _len_torch_dispatch_stack() == 2
        with profiler.phase("traced"):
            made.mul_(2)
    assert _len_torch_dispatch_stack() == 0
    for name in ("untraced", "inner", "below another"):
        phase = measured(profiler, name)
        assert (phase.live_peak, phase.breakdown, phase.traced_entries) == (None, None, None)
        assert phase.entries == 1 and phase.resident_peak is not None
    assert split(measured(profiler, "traced")).by_category()[Category.OTHER] == 1024 * FLOAT
    assert profiler.trace is not None and profiler.trace.live_bytes() == 1024 * FLOAT


def test_modules_are_known_again_after_a_pause() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    with MemoryProfiler(model) as profiler:
        with profiler.phase("untraced", trace=False):
            model(torch.ones(8, 64))
        with profiler.phase("forward"):
            result = model(torch.ones(8, 64))
    del result
    assert split(measured(profiler, "forward"))[Category.TEMPORARY, "0"] == 8 * 64 * FLOAT
