"""Tests of tensors that are recomputed in backward instead of kept."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qlora_lite.compute.lora_linear import adapted_linear
from qlora_lite.compute.recompute import (
    OutputStash,
    SharedResult,
    recomputable,
    recomputation_of,
    saving_node,
    stash_output,
    stashed_output,
)


def test_made_once_and_let_go_after_the_last_reader() -> None:
    made: list[Tensor] = []

    def make(x: Tensor) -> Tensor:
        made.append(x + 1)
        return made[-1]

    shared, inputs = SharedResult(make), (torch.ones(2),)
    for _ in range(3):
        shared.expect_reader()
    values = [shared.read(inputs) for _ in range(3)]
    assert len(made) == 1 and all(value is made[0] for value in values)
    assert shared._value is None
    shared.read(inputs)  # a second backward pass over the same graph
    assert len(made) == 2 and shared._value is None


def test_a_view_or_a_copy_cannot_be_recomputed() -> None:
    x = torch.randn(2, 3)
    y = recomputable(x + 1, lambda x: x + 1, x)
    assert recomputation_of(y) is not None
    assert (
        recomputation_of(y.view(3, 2)) is None and recomputation_of(y.double()) is None and recomputation_of(x) is None
    )


def test_what_was_changed_in_place_is_not_made_as_it_was() -> None:
    x = torch.randn(2, 3)
    y = recomputable(x + 1, lambda x: x + 1, x)
    y *= 2
    assert recomputation_of(y) is None


def layers(x: Tensor, a: Tensor, b: Tensor, recompute: bool) -> Tensor:
    """Two adapted layers over tanh(x), which is kept or made again."""
    weight = torch.eye(4)
    y = torch.tanh(x)
    y = recomputable(y, torch.tanh, x) if recompute else y
    return adapted_linear(y, weight, None, a, b) * adapted_linear(y, weight, None, a, b, scaling=2.0)


def test_gradients_are_the_same_and_the_tensor_is_not_kept() -> None:
    x, a, b = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4), torch.randn(4, 2)
    found = []
    for recompute in (False, True):
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        for run in (layers, lambda *given: checkpoint(layers, *given, use_reentrant=False)):
            y = run(x, a, b, recompute)
            grads = [torch.autograd.grad(y.sum(), (x, a, b), retain_graph=True) for _ in range(2)]
            assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))
            found.append(grads[0])
    for other in found[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[0], other, strict=True))

    kept: list[Tensor] = []
    y = recomputable(torch.tanh(x), torch.tanh, x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        adapted_linear(y, torch.eye(4), None, a, b)
    places = {tensor.data_ptr() for tensor in kept}
    assert x.data_ptr() in places and y.data_ptr() not in places


def test_the_node_that_made_a_tensor_shows_what_it_saved() -> None:
    x = torch.randn(3, requires_grad=True)
    node = saving_node(torch.tanh(x) * x)
    assert node is not None and saving_node(x.detach()) is None


def test_outputs_are_handed_out_in_their_order() -> None:
    stash, outputs = OutputStash(), [torch.ones(1), torch.zeros(1)]
    assert stashed_output() is None
    with stash.filling():
        for output in outputs:
            assert stashed_output() is None
            stash_output(output)
    with stash.using():
        assert stashed_output() == outputs[0] and stashed_output() == outputs[1] and stashed_output() is None
        stash_output(outputs[0])
    assert not stash.outputs and stashed_output() is None
