"""Mixture of experts: stacks of packed or plain matrices, and the module that computes with them expert by expert.

An experts module of transformers holds the matrices of all experts in two 3-D parameters `(experts, out, in)`. Here
each matrix may be packed, to the same codes as a layer of its own, and may have a low-rank term of its own. The forward
pass unpacks the matrices of one expert, multiplies the tokens that were routed to it, and frees them; backward does the
same again. Neither the plain stack nor the updates of all experts exist at any time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from qlora_lite.compute.lora_linear import adapted_linear
from qlora_lite.compute.products.frozen_weight import Weight
from qlora_lite.quantization.packed_weight import PackedWeight

DOWN = "down_proj"


class PackedStack(nn.Module):
    """A frozen stack of matrices, each a `PackedWeight` `(out, in)`.

    shape: of the plain tensor, `(experts, out, in)`, or `(experts, in, out)` if `transposed`.
    """

    def __init__(self, matrices: Iterable[PackedWeight], transposed: bool = False) -> None:
        super().__init__()
        self.matrices = nn.ModuleList(matrices)
        self.transposed = transposed
        # The dtype that the module around it unpacks it to; None: the dtype of the input.
        self.compute_dtype: torch.dtype | None = None

    @property
    def weight(self) -> PackedStack:
        """Itself, so that a layer around it can read `base_layer.weight`."""
        return self

    @property
    def experts(self) -> int:
        return len(self.matrices)

    def __getitem__(self, expert: int) -> PackedWeight:
        matrix = self.matrices[expert]
        assert isinstance(matrix, PackedWeight)
        return matrix

    def __iter__(self) -> Iterator[PackedWeight]:
        return (self[expert] for expert in range(len(self.matrices)))

    @property
    def shape(self) -> torch.Size:
        rows, columns = self[0].shape
        return torch.Size((len(self.matrices), *((columns, rows) if self.transposed else (rows, columns))))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the plain stack has in its model."""
        return self[0].dtype

    @property
    def device(self) -> torch.device:
        return self[0].device

    def storage_bytes(self) -> int:
        """Returns the bytes of codes and statistics of all matrices."""
        return sum(matrix.storage_bytes() for matrix in self)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Returns the whole plain tensor in this dtype, as a new tensor."""
        plain = torch.stack([matrix.dequantize(dtype) for matrix in self])
        return plain.transpose(1, 2).contiguous() if self.transposed else plain


class DenseStack(nn.Module):
    """A frozen stack of plain matrices, as a module that an adapter can wrap.

    weight: `(experts, out, in)`, or `(experts, in, out)` if `transposed`.
    """

    def __init__(self, weight: nn.Parameter, transposed: bool = False) -> None:
        super().__init__()
        self.weight = weight
        self.transposed = transposed

    @property
    def experts(self) -> int:
        return self.weight.shape[0]


@dataclass(frozen=True)
class ExpertMap:
    """The linear map of one expert: y = W x + bias + scaling * B A x, with the low-rank term if it is adapted."""

    weight: Weight
    bias: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    scaling: float
    compute_dtype: torch.dtype | None

    def __call__(self, x: Tensor) -> Tensor:
        return adapted_linear(
            x,
            self.weight,
            self.bias,
            self.lora_A,
            self.lora_B,
            scaling=self.scaling,
            compute_dtype=self.compute_dtype,
        )


class RoutedExperts(nn.Module):
    """y_t = sum over the experts e of token t of p_te * down_e(gate(up_e(x_t))), with frozen matrices.

    x `(tokens, hidden)`, experts of each token `(tokens, k)`, their weights p `(tokens, k)` -> y `(tokens, hidden)`.
    Built from an experts module of transformers, whose parameters and gate it uses; `hold_` replaces a parameter by a
    packed or adapted stack. A number for which there is no expert (a token that is not routed) adds nothing.
    Gradients: x, p, and A and B of adapted stacks, zero for an expert without tokens.
    """

    def __init__(self, experts: Any, compute_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.up = up_name(experts)
        self.compute_dtype = compute_dtype
        for name, parameter in experts._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in experts._buffers.items():
            self.register_buffer(name, buffer, name not in experts._non_persistent_buffers_set)
        for name, module in experts._modules.items():
            self.add_module(name, module)
        # In a tuple, which hides it from the tree of modules. It keeps its gate, but not its weights.
        self._plain = (experts,)
        self.train(experts.training)

    @property
    def is_transposed(self) -> bool:
        """Whether the stacks are laid out as `(experts, in, out)`."""
        return bool(self._plain[0].is_transposed)

    @property
    def stack_names(self) -> tuple[str, ...]:
        """The names of its stacks, in the order in which transformers' module declares them."""
        return tuple(name for name in self._plain[0]._parameters if name in (self.up, DOWN))

    def hold_(self, name: str, stack: PackedStack | DenseStack) -> None:
        """Replaces the parameter of this name by a stack."""
        delattr(self, name)
        self._plain[0]._parameters[name] = None
        self.add_module(name, stack)
        if isinstance(stack, PackedStack):
            stack.compute_dtype = self.compute_dtype

    def as_plain(self) -> nn.Module | None:
        """Returns transformers' module with the current parameters, None if a stack is packed or adapted."""
        held = {name: getattr(self, name) for name in self.stack_names}
        if not all(isinstance(stack, (DenseStack, nn.Parameter)) for stack in held.values()):
            return None
        plain: nn.Module = self._plain[0]
        found = {name: stack.weight if isinstance(stack, DenseStack) else stack for name, stack in held.items()}
        plain._parameters.update({**self._parameters, **found})
        plain._buffers.update(self._buffers)
        plain._modules.update({name: module for name, module in self._modules.items() if name not in found})
        return plain.train(self.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        up, down = self._maps(self.up), self._maps(DOWN)
        total = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert, token, place in _routed(top_k_index, len(up)):
            y = self._expert(hidden_states[token], up[expert], down[expert]) * top_k_weights[token, place, None]
            total.index_add_(0, token, y.float())
        return total.to(hidden_states.dtype)

    def _expert(self, x: Tensor, up: ExpertMap, down: ExpertMap) -> Tensor:
        plain = self._plain[0]
        raised = up(x)
        y = down(plain._apply_gate(raised) if plain.has_gate else plain.act_fn(raised))
        return plain.post_expert_norm(y) if plain.has_post_expert_norm else y

    def _maps(self, name: str) -> list[ExpertMap]:
        """Returns the linear map of each expert for this stack."""
        held: Any = getattr(self, name)
        # An adapter around the stack gives the merged weight, or the base weight and A and B separately.
        weight, lora = held.current_weights() if hasattr(held, "current_weights") else (held, None)
        count, scaling = weight.shape[0], held.scaling if lora else 1.0
        # Unbound once for all experts: the gradient of a single indexed part is as large as that of all.
        all_A, all_B = (part.unbind(0) for part in lora) if lora else ([None] * count, [None] * count)
        bias = getattr(self, f"{name}_bias") if self._plain[0].has_bias else [None] * count
        turned = self.is_transposed and isinstance(weight, Tensor)
        return [
            ExpertMap(weight[e].T if turned else weight[e], bias[e], all_A[e], all_B[e], scaling, self.compute_dtype)
            for e in range(count)
        ]


def _routed(top_k_index: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields (expert, its tokens, its position among the k experts of each) for every expert that has tokens.

    Fake tensors have no values: each expert gets an even share, at least one token.
    """
    if isinstance(top_k_index, FakeTensor):
        share = torch.arange(max(1, top_k_index.numel() // experts), device=top_k_index.device)
        yield from ((expert, share, torch.zeros_like(share)) for expert in range(experts))
        return
    for expert in top_k_index.unique().tolist():
        if 0 <= expert < experts:
            yield expert, *(top_k_index == expert).nonzero(as_tuple=True)


# Attributes that transformers' decorator `use_experts_implementation` sets. They describe what the module computes, so
# that another implementation, such as this one, can replace its forward.
MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm", "_apply_gate")


def up_name(experts: Any) -> str:
    """Returns the name of the first stack of an experts module."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def packable_stacks(module: Any) -> tuple[str, ...]:
    """Returns the names of the stacks of an experts module that can be packed or adapted; () for other modules."""
    if isinstance(module, RoutedExperts):
        names: tuple[str, ...] = module.stack_names
    elif all(hasattr(module, mark) for mark in MARKS):
        names = (up_name(module), DOWN)
    else:
        return ()
    return tuple(name for name in names if is_stack(module._parameters.get(name)))


def is_stack(weight: object) -> TypeGuard[nn.Parameter | PackedStack]:
    """Whether this is a 3-D parameter of matrices (not of single rows or columns), or a packed stack."""
    shape = getattr(weight, "shape", ())
    return isinstance(weight, (nn.Parameter, PackedStack)) and len(shape) == 3 and min(shape[1:]) > 1


def stacks(model: nn.Module) -> dict[str, nn.Parameter | PackedStack]:
    """Returns all stacks of matrices in a model by name, packed or not, without kernels of convolutions, A and B."""
    found: dict[str, nn.Parameter | PackedStack] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd) or hasattr(module, "lora_A"):
            continue
        for name, weight in {**module._parameters, **module._modules}.items():
            if is_stack(weight):
                found[f"{path}.{name}" if path else name] = weight
    return found
