"""Tests of causal attention on a CPU against torch, in value, gradient and precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_lite.choices import (
    ATTENTION_BACKWARD,
    ATTENTION_FORWARD,
    DEFAULTS,
    LARGE_PRODUCTS,
    TORCH,
    Choices,
    choices_in_force,
    with_overrides,
)
from qlora_lite.compute import cpu_attention
from qlora_lite.compute.cpu_attention import causal_attention
from qlora_lite.compute.recompute import OutputStash


def inputs(shape: tuple[int, int, int, int], key_heads: int, dtype: torch.dtype, values: int = 0) -> list[Tensor]:
    """q, k and v as a model makes them: transposed views, with gradients."""
    batch, heads, tokens, width = shape
    sizes = ((heads, width), (key_heads, width), (key_heads, values or width))
    made = [torch.randn(batch, tokens, *size).mul_(2).to(dtype).transpose(1, 2) for size in sizes]
    return [tensor.requires_grad_() for tensor in made]


KERNELS = [
    with_overrides(DEFAULTS, f"{ATTENTION_FORWARD}={forward},{ATTENTION_BACKWARD}={backward}")
    for forward in (LARGE_PRODUCTS, TORCH)
    for backward in (LARGE_PRODUCTS, TORCH)
]


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T + mask) v in the dtype of q, written out."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    seen = seen if mask is None else seen & mask
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v


@given(
    batch=st.integers(1, 3),
    key_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    tokens=st.integers(2, 40),
    width=st.sampled_from([4, 6]),
    values=st.sampled_from([0, 2]),
    block=st.sampled_from([1, 7, 16, 128]),
    budget=st.sampled_from([1, 1 << 12, 4 << 20]),
    together=st.sampled_from([1, 4 << 20]),
    masked=st.booleans(),
    kernels=st.sampled_from(KERNELS),
)
def test_equals_the_written_out_formula(
    batch: int,
    key_heads: int,
    group: int,
    tokens: int,
    width: int,
    values: int,
    block: int,
    budget: int,
    together: int,
    masked: bool,
    kernels: Choices,
) -> None:
    tensors = inputs((batch, group * key_heads, tokens, width), key_heads, torch.float32, values)
    mask = None
    if masked:
        mask = (torch.rand(batch, 1, tokens, tokens) < 0.7) | torch.eye(tokens, dtype=torch.bool)
    with pytest.MonkeyPatch.context() as patch, choices_in_force(kernels):
        patch.setattr(cpu_attention, "BLOCK_ROWS", block)
        patch.setattr(cpu_attention, "SCORE_BYTES", budget)
        patch.setattr(cpu_attention, "KEY_BYTES", together)
        ours = causal_attention(*tensors, 0.3, mask)
        expected = plain(*tensors, 0.3, mask)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        assert ours.transpose(1, 2).is_contiguous()
        grad = torch.randn_like(ours)
        found, wanted = (torch.autograd.grad(y, tensors, grad) for y in (ours, expected))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels", KERNELS)
def test_bf16_is_no_less_exact_than_the_written_out_formula(kernels: Choices) -> None:
    tensors = inputs((2, 6, 200, 32), 2, torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    grad = torch.randn(2, 6, 200, 32).bfloat16()

    def all_of(y: Tensor, given: list[Tensor]) -> list[Tensor]:
        return [y, *torch.autograd.grad(y, given, grad.to(y.dtype))]

    truth = all_of(plain(*exact, 0.2), exact)
    with choices_in_force(kernels):
        ours = all_of(causal_attention(*tensors, 0.2), tensors)
    naive = all_of(plain(*tensors, 0.2), tensors)
    for mine, theirs, right in zip(ours, naive, truth, strict=True):
        assert (mine - right).norm() <= (theirs - right).norm()


def test_scores_lose_nothing_to_bf16() -> None:
    q, k, _ = (tensor.detach() for tensor in inputs((1, 2, 64, 32), 2, torch.bfloat16))
    sight = cpu_attention._BlockMask(cpu_attention._later_tokens(64, q.device), slice(0, 64), None, 2)
    weights = cpu_attention._scores(q[0].float() * 0.5, k[0].float().transpose(1, 2), slice(0, 2), sight).softmax(-1)
    seen = torch.ones(64, 64, dtype=torch.bool).tril()
    exact = (q[0].double() @ k[0].double().transpose(1, 2) * 0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    torch.testing.assert_close(weights.double(), exact, rtol=1e-4, atol=1e-7)


def test_what_is_kept_is_small_and_in_the_dtype_of_the_inputs() -> None:
    tensors = inputs((1, 4, 64, 8), 2, torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        causal_attention(*tensors, 0.3)
    assert {tensor.dtype for tensor in kept} == {torch.bfloat16}
    assert sum(tensor.nbytes for tensor in kept) == sum(tensor.nbytes for tensor in tensors)


def test_a_stash_hands_the_outputs_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs((1, 2, 9, 4), 1, torch.float32)
    stash = OutputStash()
    with stash.filling():
        first, second = causal_attention(*tensors, 0.3), causal_attention(*tensors, 0.6)
    wanted = torch.autograd.grad(second.sum(), tensors)
    calls: list[int] = []
    attend = cpu_attention.attend
    monkeypatch.setattr(cpu_attention, "attend", lambda *given: (calls.append(1), attend(*given))[1])
    with stash.using():
        again = causal_attention(*tensors, 0.3), causal_attention(*tensors, 0.6)
        assert not calls
        causal_attention(*tensors, 0.3)
    assert calls == [1] and not stash.outputs
    assert torch.equal(again[0], first) and torch.equal(again[1], second)
    for mine, theirs in zip(torch.autograd.grad(again[1].sum(), tensors), wanted, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_chosen_kernels_run_and_a_stash_serves_them(kernels: Choices) -> None:
    tensors = inputs((2, 6, 40, 8), 2, torch.bfloat16)
    stash, ran = OutputStash(), []

    class Kernels(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran.append(func.__name__.split(".")[0])
            return func(*args, **(kwargs or {}))

    name = "_scaled_dot_product_flash_attention_for_cpu"
    with choices_in_force(kernels), Kernels():
        with stash.filling():
            first = causal_attention(*tensors, 0.3)
        assert (name in ran) == (kernels[f"{ATTENTION_FORWARD}.bf16.short"] == TORCH)
        wanted = torch.autograd.grad(first.sum(), tensors)
        assert (f"{name}_backward" in ran) == (kernels[f"{ATTENTION_BACKWARD}.bf16.short"] == TORCH)
        ran.clear()
        with stash.using():
            again = causal_attention(*tensors, 0.3)
        assert not stash.outputs and not {name, "bmm"} & set(ran) and torch.equal(again, first)
        for mine, theirs in zip(torch.autograd.grad(again.sum(), tensors), wanted, strict=True):
            assert torch.equal(mine, theirs)


def test_the_length_of_the_rows_decides_which_choice_holds() -> None:
    query = torch.empty(1, 1, 257, 8, dtype=torch.bfloat16)
    with choices_in_force(with_overrides(DEFAULTS, f"{ATTENTION_FORWARD}.bf16.medium=torch")):
        assert cpu_attention._kernels(query, query)[:2] == (TORCH, LARGE_PRODUCTS)
        assert cpu_attention._kernels(query[:, :, 1:], query).forward == LARGE_PRODUCTS
        assert cpu_attention._kernels(query.float(), query).forward == LARGE_PRODUCTS
        assert cpu_attention._kernels(query, query[..., 1:]).forward == LARGE_PRODUCTS  # torch's takes one width


def test_torchs_own_agrees() -> None:
    q, k, v = inputs((2, 4, 50, 16), 2, torch.float32)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(causal_attention(q, k, v, 16**-0.5), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 9])
def test_fake_tensors_of_any_batch_give_the_shapes_of_real_ones(rows: int) -> None:
    with FakeTensorMode():
        query = torch.empty(rows, 32, 256, 64, dtype=torch.bfloat16, requires_grad=True)
        key = torch.empty(rows, 4, 256, 64, dtype=torch.bfloat16, requires_grad=True)
        out = causal_attention(query, key, key, 0.1, None)
        out.sum().backward()
    assert out.shape == query.shape and key.grad is not None
