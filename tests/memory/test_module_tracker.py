"""Tests of attributing tensors to the module that runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.module_tracker import ModuleTracker
from qlora_lite.memory.trace import StorageTrace


class Asked(torch.autograd.Function):
    """The identity, which notes the current module in forward and in backward."""

    @staticmethod
    def forward(ctx: object, x: Tensor, running: ModuleTracker, said: list[str]) -> Tensor:
        ctx.running, ctx.said = running, said  # type: ignore[attr-defined]
        said.append(f"forward {running.current()}")
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.said.append(f"backward {ctx.running.current()}")  # type: ignore[attr-defined]
        return grad, None, None


class Leaf(nn.Module):
    def __init__(self, running: ModuleTracker, said: list[str]) -> None:
        super().__init__()
        self.running, self.said = running, said

    def forward(self, x: Tensor) -> Tensor:
        return Asked.apply(x, self.running, self.said)


class Outer(nn.Module):
    def __init__(self, running: ModuleTracker, said: list[str], recomputes: bool) -> None:
        super().__init__()
        self.first, self.second = Leaf(running, said), Leaf(running, said)
        self.running, self.said, self.recomputes = running, said, recomputes

    def forward(self, x: Tensor) -> Tensor:
        inner = lambda y: self.second(Asked.apply(self.first(y), self.running, self.said))  # noqa: E731
        return checkpoint(inner, x, use_reentrant=False) if self.recomputes else inner(x)


FORWARD = ["forward outer.first", "forward outer", "forward outer.second", "forward None"]
BACKWARD = ["backward None", "backward outer.second", "backward outer", "backward outer.first"]


@pytest.mark.parametrize("recomputes", [False, True])
def test_forward_and_backward_of_a_module_are_its_own(recomputes: bool) -> None:
    running, said = ModuleTracker(), []
    model = nn.ModuleDict({"outer": Outer(running, said, recomputes)})
    running.track(model)
    with running:
        for _ in range(2):
            x = torch.ones(3, requires_grad=True)
            Asked.apply(model["outer"](x), running, said).sum().backward()
    # These nodes save no tensors, so nothing is recomputed.
    assert said == 2 * (FORWARD + BACKWARD)
    assert running.current() is None


def test_an_exception_leaves_nothing_running() -> None:
    running = ModuleTracker()

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError(running.current())

    model = nn.Sequential(nn.Sequential(Broken()))
    running.track(model)
    with running:
        with pytest.raises(RuntimeError, match=r"0\.0"):
            model(torch.ones(1))
        assert running.current() is None


def test_hooks_are_gone_afterwards() -> None:
    model, running = nn.Linear(2, 2), ModuleTracker()
    running.track(model)
    with running:
        pass
    from torch.nn.modules import module

    assert not module._global_forward_hooks and not module._global_forward_pre_hooks
    model(torch.ones(2))
    assert running.current() is None


@contextmanager
def traced(model: nn.Module) -> Iterator[StorageTrace]:
    trace = StorageTrace()
    trace.track_modules(model)
    with trace:
        yield trace


def test_recomputed_and_gradient_bytes_go_to_the_module_that_made_them() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 64), nn.GELU()), nn.Sequential(nn.Linear(64, 8), nn.Tanh()))
    with traced(model) as trace:
        x = torch.ones(4, 8)
        for block in model:
            x = checkpoint(block, x, use_reentrant=False)
        with trace.phase("backward"):
            x.sum().backward()
    made = {
        (event.category, event.module) for event in trace.timeline() if event.phase == "backward" and event.delta > 0
    }
    modules = {module for category, module in made if category == Category.TEMPORARY}
    assert {"0.0", "0.1", "1.0", "1.1"} <= modules
    assert trace.peak_in("backward") in {"0.0", "0.1", "1.0", "1.1"}
