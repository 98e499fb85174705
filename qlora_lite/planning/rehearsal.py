"""`rehearse`: predicts the memory of a training step by running it on fake tensors, without weights and without a GPU.

What is fake. Within `fake_tensors` every new tensor is one of torch's fake tensors: it has a shape, a dtype, strides
and a storage with a size, but no bytes. Operators run as shape computations. The code of the step runs unchanged:
models, autograd, optimizers, packing.

What is traced. The same `StorageTrace` as in a measured run follows every storage, so the report has the same form:
live tensor bytes by phase, category and module. On a CPU they agree with a measured run to the byte.

What has no answer. A fake tensor has no values. Code that reads one (is the loss finite? which is the largest token?)
gets 1, or True, and so takes the branch of a step in which all is well. Code whose allocations depend on values
(`nonzero`, boolean indexing) cannot be rehearsed and raises RehearsalError.

The accelerator that is pretended. A CPU build of torch cannot run autograd on fake CUDA tensors. With
`accelerator=True` the fake tensors therefore stay on the CPU, and three things differ:
- This package takes them for an accelerator's (compute/devices.py), so that its kernels for CPUs are not used, and
  attention saves what a fused kernel saves: its output and one log-sum-exp for each row.
- Memory that CUDA libraries allocate without a tensor is added to the trace (cuda_workspaces.py).
- The trace is replayed by a model of the caching allocator (cuda_allocator.py), which gives `allocated_peak` and
  `reserved_peak`.

What cannot be seen. Memory of the process or the device outside of tensors and the allocator: the context, the
interpreter, libraries. Memory that an operator allocates inside itself, unless cuda_workspaces.py lists it. Tensors
created before the rehearsal are real; they count as OTHER from the first operator that uses them.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from torch._ops import OpOverload
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
from qlora_lite.progress.work import progress_shown
from qlora_lite.quantization.kernels import bnb

STEP = "step"  # the phase around everything that `rehearse` runs
VALUE_DEPENDENT_ERRORS = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)


class _AnswerValues(TorchDispatchMode):
    """Answers 1, or True, where code reads the value of a fake tensor (`item()`, `bool()`, `float()`)."""

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        if func is torch.ops.aten._local_scalar_dense.default:
            (tensor,) = args
            assert isinstance(tensor, Tensor)
            return True if tensor.dtype == torch.bool else 1.0 if tensor.dtype.is_floating_point else 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _errors_unlogged() -> Iterator[None]:
    """Keeps torch from logging the traceback of an operator that fails on fake tensors: its error is raised too."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def fake_tensors(accelerator: bool = False) -> Iterator[None]:
    """Makes every new tensor within the block a fake one.

    accelerator: let them stand for tensors of a CUDA device. Raises RehearsalError where allocations depend on values.
    """
    # bitsandbytes creates this table at its first use and keeps it. Created on fake tensors, it would stay fake.
    bnb.name2qmap.setdefault("dynamic", bnb.create_dynamic_map())
    # What is loaded or trained on fake tensors is not work that a user waits for by itself.
    unseen, pretended = progress_shown(False), accelerator_pretended() if accelerator else nullcontext()
    with unseen, pretended, patched_mask_creation(), _errors_unlogged():
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), _AnswerValues(), patched_module_apply():
                yield
        except VALUE_DEPENDENT_ERRORS as error:
            first_line = next(iter(str(error).strip().splitlines()), "")
            raise RehearsalError(
                "this step cannot be rehearsed: its allocations depend on values of tensors, or an operator has no "
                f"fake kernel ({type(error).__name__}: {first_line})"
            ) from error


def fake_profiler(accelerator: bool = False) -> MemoryProfiler:
    """Returns a profiler for fake tensors; for an accelerator, its trace includes the workspaces of CUDA libraries."""

    def new_trace() -> StorageTrace:
        return StorageTrace(transient_workspace_bytes, persistent_workspace_bytes) if accelerator else StorageTrace()

    return MemoryProfiler(new_trace=new_trace, counters=False)


@contextmanager
def rehearsal(accelerator: bool = False) -> Iterator[MemoryProfiler]:
    """Makes every new tensor within the block a fake one, and yields the open profiler that traces them."""
    with fake_tensors(accelerator), fake_profiler(accelerator) as profiler:
        yield profiler


def rehearse(
    step: Callable[[], object] | Callable[[MemoryProfiler], object], *, accelerator: bool = False
) -> MemoryReport:
    """Predicts the memory that `step` would take, as a report of the same form as that of a measured run.

    Args:
        step: a callable that creates its model, optimizer and batch itself and runs the steps to be predicted (the
            second step shows optimizer states next to activations). If it takes an argument, that is a `MemoryProfiler`
            whose `phase` and `track` name phases and categories. All of it is the phase `step`.
        accelerator: predict for a CUDA device instead of a CPU. The report then has `allocated_peak` and
            `reserved_peak` of the caching allocator too.

    The module docstring lists what is not predicted. Raises RehearsalError where allocations depend on values.
    """
    with rehearsal(accelerator) as profiler, profiler.phase(STEP):
        arguments = (profiler,) if inspect.signature(step).parameters else ()
        step(*arguments)
    return rehearsed_report(profiler, accelerator)


def rehearsed_report(profiler: MemoryProfiler, accelerator: bool) -> MemoryReport:
    """Returns the report of a rehearsal's profiler; for an accelerator, with the peaks of its allocator.

    These are the peaks while a phase was the innermost one (cuda_allocator.py), and for `step`, which contains all
    other phases, the peaks of the whole run.
    """
    report = replace(profiler.report(), rehearsed=True)
    if not accelerator or profiler.trace is None:
        return report
    replayed = replay(profiler.trace.timeline())

    def on_device(phase: PhaseMemory) -> PhaseMemory:
        usage = replayed.peak if phase.name == STEP else replayed.by_phase.get(phase.name)
        if usage is None:
            return phase
        return replace(phase, allocated_peak=usage.allocated, reserved_peak=usage.reserved)

    return replace(report, phases=tuple(map(on_device, report.phases)))
