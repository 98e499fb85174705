"""Predicts the memory of a step by running it on fake tensors: shapes and storages without bytes, weights or a GPU.

Whatever code the step runs is run, every storage that it makes is followed (trace.py), and the same report comes out
as of a measured run. What the code asks of values (is the loss finite? which is the largest token?) has no answer on
fake tensors; it gets 1, or True, and so takes the way of a step in which all is well. Shapes that depend on values
cannot be known, and are an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_lite.compute.devices import accelerator_pretended
from qlora_lite.errors import RehearsalError
from qlora_lite.memory.profiler import MemoryProfiler
from qlora_lite.memory.report import MemoryReport, PhaseMemory
from qlora_lite.memory.trace import StorageTrace
from qlora_lite.patches import patched_mask_creation, patched_module_apply
from qlora_lite.planning.cuda_allocator import replay
from qlora_lite.planning.cuda_workspaces import persistent_workspace_bytes, transient_workspace_bytes
from qlora_lite.quantization.kernels import bnb

WHOLE = "step"
UNKNOWABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)


class _Answers(TorchDispatchMode):
    """Says 1, or True, to whoever asks a fake tensor for its value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_tensors(accelerator: bool = False) -> Iterator[None]:
    """Within the block new tensors are fake ones; with `accelerator` they stand for those of a CUDA device.

    RehearsalError for what cannot be known without values.
    """
    # bitsandbytes makes this table when it first needs it and keeps it: a fake one would be there for good.
    bnb.name2qmap.setdefault("dynamic", bnb.create_dynamic_map())
    with accelerator_pretended() if accelerator else nullcontext(), patched_mask_creation():
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), _Answers(), patched_module_apply():
                yield
        except UNKNOWABLE as error:
            first_line = next(iter(str(error).strip().splitlines()), "")
            raise RehearsalError(
                f"this step cannot be rehearsed: what it allocates depends on values of tensors, or an operator has no "
                f"fake kernel ({type(error).__name__}: {first_line})"
            ) from error


def fake_profiler(accelerator: bool = False) -> MemoryProfiler:
    """A profiler that follows fake tensors; for an accelerator also what its kernels allocate inside themselves
    (kernel_workspaces.py)."""
    return MemoryProfiler(
        new_trace=lambda: (
            StorageTrace(transient_workspace_bytes, persistent_workspace_bytes) if accelerator else StorageTrace()
        ),
        counters=False,
    )


@contextmanager
def rehearsal(accelerator: bool = False) -> Iterator[MemoryProfiler]:
    """Within the block new tensors are `fake_tensors`, and the profiler that it gives follows them."""
    with fake_tensors(accelerator), fake_profiler(accelerator) as profiler:
        yield profiler


def rehearse(step: Callable[..., Any], *, accelerator: bool = False) -> MemoryReport:
    """The memory that `step` would take, as a report like that of a measured run.

    step: any callable that makes its model, optimizer and batch itself and takes as many steps as are to be seen (the
    second shows optimizer states beside activations). If it takes an argument, it is given a `MemoryProfiler`, whose
    `phase` and `track` name phases and categories; all of it is the phase `step`.
    Live tensor bytes; for an accelerator what its allocator makes of them too. What the process or the device takes
    beside tensors is not rehearsed. Tensors that exist before are real, and count as OTHER where the step meets them.
    """
    with rehearsal(accelerator) as profiler, profiler.phase(WHOLE):
        if inspect.signature(step).parameters:
            step(profiler)
        else:
            step()
    return rehearsed_report(profiler, accelerator)


def rehearsed_report(profiler: MemoryProfiler, accelerator: bool) -> MemoryReport:
    """What the profiler of a rehearsal has seen; for an accelerator also what its allocator would allocate and reserve.

    That is the peak of the phase itself (cuda_allocator.py), and of the whole run for the phase that all others lie in.
    """
    report = replace(profiler.report(), rehearsed=True)
    if not accelerator or profiler.trace is None:
        return report
    replayed = replay(profiler.trace.timeline())

    def on_device(phase: PhaseMemory) -> PhaseMemory:
        usage = replayed.peak if phase.name == WHOLE else replayed.by_phase.get(phase.name)
        if usage is None:
            return phase
        return replace(phase, allocated_peak=usage.allocated, reserved_peak=usage.reserved)

    return replace(report, phases=tuple(map(on_device, report.phases)))
