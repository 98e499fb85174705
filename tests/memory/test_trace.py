"""Tests of tracing storages, on real and on fake tensors."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import _len_torch_dispatch_stack
from torch.utils.checkpoint import checkpoint

from qlora_lite.errors import ConfigError
from qlora_lite.memory.breakdown import Category, MemoryBreakdown
from qlora_lite.memory.trace import StorageTrace

FLOAT = 4


class Blocks(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 16)) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x))
        return x.square().mean()


def train_blocks(trace: StorageTrace, checkpointed: bool, steps: int = 2) -> None:
    """Runs steps of AdamW and labels tensors only after each step, parameters and states only at the end."""
    with trace:
        model = Blocks(checkpointed)
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(steps):
            x = torch.randn(32, 16)
            with trace.phase("forward"):
                loss = model(x)
            with trace.phase("backward"):
                loss.backward()
            with trace.phase("optimizer"):
                optimizer.step()
            for parameter in model.parameters():
                trace.label(parameter.grad, Category.GRADIENT)
            optimizer.zero_grad()
        for parameter in model.parameters():
            trace.label(parameter, Category.ADAPTER)
            for state in optimizer.state[parameter].values():
                trace.label(state, Category.OPTIMIZER_STATE)


def parameter_bytes() -> int:
    return sum(p.numel() * FLOAT for p in Blocks(False).parameters())


def test_one_step_of_a_linear_layer_to_the_byte() -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    trace = StorageTrace()
    for parameter in model.parameters():
        trace.label(parameter, Category.ADAPTER, "linear")
    with trace:
        with trace.phase("forward"):
            x = torch.ones(2, 4)
            loss = model(x).relu().sum()
        with trace.phase("backward"):
            loss.backward()
        with trace.phase("optimizer"):
            optimizer.step()
        for parameter in model.parameters():
            trace.label(parameter.grad, Category.GRADIENT, "linear")
            for state in optimizer.state[parameter].values():
                trace.label(state, Category.OPTIMIZER_STATE, "linear")
    weights = {(Category.ADAPTER, "linear"): 15 * FLOAT}
    # x, and the result of relu; the result of the layer itself is gone when relu is done.
    forward = {**weights, (Category.ACTIVATION, None): (8 + 6) * FLOAT, (Category.TEMPORARY, None): 6 * FLOAT}
    # x, the loss and the 1 that backward starts from; the gradient of the layer's result is the temporary.
    gradients = {**weights, (Category.GRADIENT, "linear"): 15 * FLOAT}
    backward = {**gradients, (Category.ACTIVATION, None): (8 + 1 + 1) * FLOAT, (Category.TEMPORARY, None): 6 * FLOAT}
    # two moments of everything and one step count for each parameter; sqrt and its quotient for the weight.
    states = {**gradients, (Category.OPTIMIZER_STATE, "linear"): (2 * 15 + 2) * FLOAT}
    optimizer_step = {**states, (Category.ACTIVATION, None): 9 * FLOAT, (Category.TEMPORARY, None): 2 * 12 * FLOAT}
    for phase, sizes in (("forward", forward), ("backward", backward), ("optimizer", optimizer_step)):
        assert trace.peak(phase) == (sum(sizes.values()), MemoryBreakdown(sizes)), phase
    assert trace.peak() == trace.peak("optimizer")
    assert trace.live_bytes() == sum(states.values()) + 9 * FLOAT


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_peak_is_that_of_torchs_own_tracker(checkpointed: bool) -> None:
    trace = StorageTrace()
    train_blocks(trace, checkpointed, steps=1)
    with MemTracker() as theirs:
        model = Blocks(checkpointed)
        theirs.track_external(model)
        optimizer = torch.optim.AdamW(model.parameters())
        x = torch.randn(32, 16)
        loss = model(x)
        loss.backward()
        optimizer.step()
    peak = theirs.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert trace.peak()[0] == peak


@pytest.mark.parametrize("checkpointed", [False, True])
def test_fake_tensors_give_the_same_log_as_real_ones(checkpointed: bool) -> None:
    real, inside, around = StorageTrace(), StorageTrace(), StorageTrace()
    train_blocks(real, checkpointed)
    with FakeTensorMode():
        train_blocks(inside, checkpointed)
    with around, FakeTensorMode():
        model = Blocks(checkpointed)
        loss = model(torch.randn(32, 16))
        loss.backward()
    for phase in (None, "forward", "backward", "optimizer"):
        assert inside.peak(phase) == real.peak(phase)
    assert real.peak("backward")[0] > 2 * parameter_bytes()
    assert around.peak()[0] > 2 * parameter_bytes()


def test_final_labels_hold_at_the_peak_and_recomputation_moves_bytes_out_of_activations() -> None:
    plain, recomputing = StorageTrace(), StorageTrace()
    train_blocks(plain, False)
    train_blocks(recomputing, True)
    step_counts = 18 * FLOAT
    for trace in (plain, recomputing):
        held = trace.peak("optimizer")[1].by_category()
        assert held[Category.ADAPTER] == held[Category.GRADIENT] == parameter_bytes()
        assert held[Category.OPTIMIZER_STATE] == 2 * parameter_bytes() + step_counts
        assert held[Category.OTHER] == 0
    kept, recomputed = (t.peak("forward")[1].by_category()[Category.ACTIVATION] for t in (plain, recomputing))
    # Without recomputation each block keeps at least its input and three results of width 64.
    assert kept >= 3 * 32 * (16 + 3 * 64) * FLOAT
    assert recomputed < kept / 3
    kept, recomputed = (t.peak("backward")[1].by_category()[Category.TEMPORARY] for t in (plain, recomputing))
    assert recomputed > kept


def test_views_and_in_place_operators_count_once() -> None:
    with StorageTrace() as trace:
        base = torch.zeros(10, 10)
        view, alias, row = base.t(), base.detach(), base[3]
        base.add_(1).mul_(2)
        row.fill_(5)
        nn.Parameter(base)
        torch.add(base, 1, out=base)
        assert trace.live_bytes() == 100 * FLOAT
        del base, view, alias
        assert trace.live_bytes() == 100 * FLOAT
        del row
        assert trace.live_bytes() == 0
    assert trace.peak()[0] == 100 * FLOAT
    assert [event.delta for event in trace.timeline()] == [400, -400]


def test_nothing_is_kept_alive() -> None:
    gc.disable()
    try:
        with StorageTrace() as trace:
            tensor = torch.zeros(8, requires_grad=True)
            trace.label(tensor, Category.ADAPTER)
            (tensor * 2).sum().backward()
            tensor_ref, storage_ref = weakref.ref(tensor), weakref.ref(tensor.untyped_storage())
            gradient_ref = weakref.ref(tensor.grad.untyped_storage())
            del tensor
            assert tensor_ref() is storage_ref() is gradient_ref() is None
            assert trace.live_bytes() == 0
    finally:
        gc.enable()


def test_a_label_reaches_back_and_the_last_one_counts() -> None:
    with StorageTrace() as trace:
        tensor = torch.zeros(6)
        trace.label(tensor, Category.GRADIENT, "first")
        trace.label(tensor.view(2, 3), Category.OPTIMIZER_STATE, "second")
    trace.label(tensor, Category.ADAPTER, "third")
    assert trace.peak() == (24, MemoryBreakdown({(Category.ADAPTER, "third"): 24}))


def test_after_the_run_its_numbers_stand() -> None:
    with StorageTrace() as trace:
        tensor = torch.zeros(6)
    trace.label(torch.zeros(100), Category.ADAPTER)
    del tensor
    assert trace.live_bytes() == 24
    assert [event.delta for event in trace.timeline()] == [24]


def test_a_storage_created_before_the_trace_is_other() -> None:
    before = torch.ones(5)
    with StorageTrace() as trace:
        product = before * 2
        before.add_(1)
    assert trace.peak()[1].by_category()[Category.OTHER] == before.nbytes
    assert trace.peak()[0] == before.nbytes + product.nbytes


@pytest.mark.parametrize("fake", [False, True])
def test_a_constant_counts_once(fake: bool) -> None:
    with FakeTensorMode() if fake else nullcontext(), StorageTrace() as trace:
        constant = torch.tensor([1.0, 2.0])
        assert trace.live_bytes() == constant.nbytes
    assert trace.peak()[1] == MemoryBreakdown({(Category.TEMPORARY, None): constant.nbytes})


def test_a_storage_created_in_backward_does_not_wait_for_the_next_backward() -> None:
    weight = nn.Parameter(torch.ones(100))
    with StorageTrace() as trace:
        for _ in range(2):
            weight.sum().backward()
    held = trace.peak()[1].by_category()
    assert held[Category.TEMPORARY] >= weight.nbytes
    assert held[Category.ACTIVATION] <= 2 * FLOAT


def test_meta_and_empty_tensors_have_no_bytes() -> None:
    with StorageTrace() as trace:
        kept = torch.empty(1000, device="meta"), torch.empty(0), nn.Linear(50, 50, device="meta")
    assert kept
    assert trace.peak() == (0, MemoryBreakdown())


def test_resized_storages_are_followed() -> None:
    untouched = vars(torch.UntypedStorage).get("resize_")
    with StorageTrace() as outer, StorageTrace() as inner:
        tensor = torch.zeros(10)
        tensor.untyped_storage().resize_(0)
        assert outer.live_bytes() == inner.live_bytes() == 0
        tensor.untyped_storage().resize_(80)
        assert outer.live_bytes() == inner.live_bytes() == 80
        tensor.resize_(50)
        assert outer.live_bytes() == inner.live_bytes() == 200
    assert [event.delta for event in inner.timeline()] == [40, -40, 80, 120]
    assert vars(torch.UntypedStorage).get("resize_") is untouched


def test_sparse_gradients_are_counted_by_their_parts() -> None:
    with StorageTrace() as trace:
        table = nn.Embedding(1000, 4, sparse=True)
        table(torch.tensor([3, 7])).sum().backward()
        trace.label(table.weight.grad, Category.GRADIENT)
    index_and_rows = 2 * 8 + 2 * 4 * FLOAT
    assert sum(e.delta for e in trace.timeline() if e.category is Category.GRADIENT) == index_and_rows


def test_modes_are_restored_when_the_run_fails() -> None:
    depth = _len_torch_dispatch_stack()
    untouched = vars(torch.UntypedStorage).get("resize_")
    trace = StorageTrace()
    with pytest.raises(RuntimeError, match="mat1 and mat2"), trace, trace.phase("forward"):
        nn.Linear(2, 3)(torch.zeros(1, 5))
    assert _len_torch_dispatch_stack() == depth
    assert vars(torch.UntypedStorage).get("resize_") is untouched
    with pytest.raises(ConfigError, match="has already traced a run; make a new one"):
        trace.__enter__()


def test_phases_nest_and_repeat() -> None:
    with StorageTrace() as trace:
        kept = torch.zeros(1)
        for size in (10, 30, 20):
            with trace.phase("outer"):
                with trace.phase("inner"):
                    torch.zeros(size)
                torch.zeros(5)
    assert trace.phases() == ("outer", "inner")
    assert trace.peak("inner")[0] == trace.peak("outer")[0] == 31 * FLOAT
    assert [e.phase for e in trace.timeline()] == [None] + 3 * ["inner", "inner", "outer", "outer"]
    assert kept.nbytes == trace.live_bytes()
    with pytest.raises(ConfigError, match="no phase 'load' was entered; there were: outer, inner"):
        trace.peak("load")


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("make"), st.integers(0, 50)),
        st.tuples(st.just("view"), st.integers(0, 20)),
        st.tuples(st.just("free"), st.integers(0, 20)),
        st.tuples(st.just("grow"), st.integers(0, 20)),
        st.tuples(st.just("label"), st.integers(0, 20), st.sampled_from(Category)),
    ),
    max_size=40,
)


class Oracle:
    """Live bytes counted by hand: a list with the number of a storage for each tensor that holds it."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.labels: list[Category] = []
        self.names: list[int] = []
        self.moments: list[dict[int, int]] = [{}]

    def note(self) -> None:
        self.moments.append({n: self.sizes[n] for n in set(self.names)})

    def peak(self) -> tuple[int, dict[Category, int]]:
        most = max(self.moments, key=lambda moment: sum(moment.values()))
        split = dict.fromkeys(Category, 0)
        for number, size in most.items():
            split[self.labels[number]] += size
        return sum(most.values()), split


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_random_lives_of_tensors_against_an_oracle(steps: list[tuple]) -> None:
    oracle, tensors = Oracle(), []
    with StorageTrace() as trace:
        for kind, number, *category in steps:
            if kind == "make":
                tensors.append(torch.zeros(number))
                oracle.names.append(len(oracle.sizes))
                oracle.sizes.append(number * FLOAT)
                oracle.labels.append(Category.TEMPORARY)
            elif tensors:
                at = number % len(tensors)
                storage = oracle.names[at]
                if kind == "view":
                    tensors.append(tensors[at].view(-1))
                    oracle.names.append(storage)
                elif kind == "free":
                    del tensors[at], oracle.names[at]
                elif kind == "grow":
                    oracle.sizes[storage] += 2 * FLOAT
                    tensors[at].untyped_storage().resize_(oracle.sizes[storage])
                else:
                    trace.label(tensors[at], category[0])
                    oracle.labels[storage] = category[0]
            oracle.note()
        assert trace.live_bytes() == sum(oracle.moments[-1].values())
    peak, breakdown = trace.peak()
    assert (peak, breakdown.by_category()) == oracle.peak()
    assert breakdown.total() == peak
