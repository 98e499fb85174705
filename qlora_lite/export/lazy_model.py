"""A lazy model: each weight is read when its module is called, some rows at a time, and freed afterwards.

    y = W x  =  [W_1 x; W_2 x; ...]      W_i: slices of the rows of W, from memory, packed, or on disk

Used by verify.py. Linear and embedding layers are computed slice by slice, so no large matrix is ever whole in memory;
other modules (norms, stacks of experts) get their tensors for one call. Everything is computed in fp32 on the CPU,
where products in fp16 are slow; rounding of activations would also hide differences between weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_lite import architecture
from qlora_lite.compute.slicing import regrouped_rows
from qlora_lite.compute.weight_update import Delta
from qlora_lite.errors import ConfigError
from qlora_lite.patches import patched_forward
from qlora_lite.signals import check_signals
from qlora_lite.surgery import has_own_forward, is_transposed_linear

# The tolerance for the same value computed in fp32 by operations in another order.
TOLERANCE = 1e-5

_Layer = TypeVar("_Layer", bound=nn.Module)


@dataclass(frozen=True)
class LazyWeights:
    """The weights of a lazy model, by the names of a plain checkpoint.

    tensors: each call yields all rows of the tensor, in slices. deltas: low-rank updates that are applied to the
    activations, y = W x + scaling * B (A x), W being the tensor of the same name.
    """

    tensors: Mapping[str, Callable[[], Iterable[Tensor]]]
    deltas: Mapping[str, Delta] = field(default_factory=dict)

    def slices(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Yields (first row, rows) on the CPU; floats in fp32."""
        first = 0
        for rows in self.tensors[name]():
            check_signals()
            yield first, rows.to("cpu", torch.float32 if rows.is_floating_point() else rows.dtype)
            first += rows.shape[0] if rows.dim() else 1

    def whole(self, name: str) -> Tensor:
        """Returns the whole tensor."""
        pieces = [rows for _, rows in self.slices(name)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def low_rank(self, name: str) -> tuple[Tensor, Tensor, float] | None:
        """Returns (left, right, scaling) of the update of a weight, None if it has none."""
        delta = self.deltas.get(name)
        return None if delta is None else (delta.left.cpu(), delta.right.cpu(), delta.scaling)


class _RefuseUnreadWeights(TorchDispatchMode):
    """Raises ConfigError for an operation on a weight that was not read.

    torch does not: a product of a CPU tensor and a meta tensor returns uninitialized memory.
    """

    def __init__(self, model_name: str) -> None:
        super().__init__()
        self._model_name = model_name

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        if any(isinstance(value, Tensor) and value.is_meta for value in tree_leaves((args, kwargs))):
            raise ConfigError(
                f"a {self._model_name} cannot be verified: it uses a weight without calling the module that holds it"
            )
        return func(*args, **(kwargs or {}))


def _ramp(x: Tensor) -> Tensor:
    """Returns one known logit for each row of x, which shows how the model changes the output of its head."""
    rows = x.shape[:-1]
    return torch.linspace(-20, 20, rows.numel()).view(*rows, 1)


def _is_plain(module: nn.Module, kind: type[_Layer]) -> TypeGuard[_Layer]:
    return isinstance(module, kind) and not has_own_forward(module) and getattr(module, "max_norm", None) is None


class LazyModel:
    """A transformers model on the meta device that is called with the `LazyWeights` given for that call.

    names: of the checkpoint's tensors; a tied weight is read under the one of its names that is among them. Raises
    ConfigError for a model without a plain linear output head.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        head = architecture.output_head(model)
        if head is None or not _is_plain(head, nn.Linear):
            got = "none" if head is None else type(head).__name__
            raise ConfigError(f"only a model with a plain linear output head can be verified; this head is {got}")
        self._model, self._head, self._options = model, head, architecture.logit_options(model)
        architecture.fill_computed_buffers_(model, torch.device("cpu"))
        stored_names = set(names)
        self._name_of: dict[int, str] = {
            id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items() if name in stored_names
        }

    def _stored(self, module: nn.Module) -> Iterator[tuple[dict[str, Any], str, str]]:
        """Yields (dict that holds it, key, name in the checkpoint) of each tensor that the module holds directly."""
        for holder in (module._parameters, module._buffers):
            for key, tensor in holder.items():
                if tensor is not None and id(tensor) in self._name_of:
                    yield holder, key, self._name_of[id(tensor)]

    def _bias(self, weights: LazyWeights, module: nn.Module) -> Tensor | None:
        return None if module.bias is None else weights.whole(self._name_of[id(module.bias)])

    def _linear(self, module: nn.Linear, weights: LazyWeights) -> Callable[[Tensor], Tensor]:
        name = self._name_of[id(module.weight)]

        def forward(x: Tensor) -> Tensor:
            y = x.new_empty((*x.shape[:-1], module.out_features))
            bias, low = self._bias(weights, module), weights.low_rank(name)
            for first, rows in weights.slices(name):
                part = slice(first, first + rows.shape[0])
                y[..., part] = F.linear(x, rows, None if bias is None else bias[part])
            if low is not None:
                left, right, scaling = low
                y += scaling * F.linear(F.linear(x, right), left)
            return y

        return forward

    def _embedding(self, module: nn.Embedding, weights: LazyWeights) -> Callable[[Tensor], Tensor]:
        name = self._name_of[id(module.weight)]

        def forward(tokens: Tensor) -> Tensor:
            y = torch.empty((*tokens.shape, module.embedding_dim))
            for first, rows in weights.slices(name):
                inside = (tokens >= first) & (tokens < first + rows.shape[0])
                y[inside] = rows[tokens[inside] - first]
            low = weights.low_rank(name)
            if low is not None:
                left, right, scaling = low
                y += scaling * (left[tokens] @ right)
            return y

        return forward

    def _transposed_linear(self, module: Any, weights: LazyWeights) -> Callable[[Tensor], Tensor]:
        """y = x W + bias with W `(in, out)`, as in GPT-2: each slice of rows of W adds to all of y."""
        name = self._name_of[id(module.weight)]

        def forward(x: Tensor) -> Tensor:
            y = x.new_zeros((*x.shape[:-1], module.weight.shape[1]))
            bias, low = self._bias(weights, module), weights.low_rank(name)
            for first, rows in weights.slices(name):
                y += x[..., first : first + rows.shape[0]] @ rows
            if low is not None:
                left, right, scaling = low
                y += scaling * (x @ left @ right)
            return y if bias is None else y.add_(bias)

        return forward

    def _other(self, module: nn.Module, weights: LazyWeights) -> Callable[..., object]:
        usual = module.forward
        adapted = [name for _, _, name in self._stored(module) if weights.low_rank(name) is not None]
        if stacks := [name for holder, key, name in self._stored(module) if name in adapted and holder[key].dim() != 2]:
            raise ConfigError(f"{stacks[0]} has an adapter on a {type(module).__name__}, which cannot be verified")

        def forward(*args: object, **kwargs: object) -> object:
            stored = [(holder, key, holder[key], name) for holder, key, name in self._stored(module)]
            try:
                for holder, key, empty, name in stored:
                    tensor = weights.whole(name).view(empty.shape)  # a stack is read as the rows of its matrices
                    if (low := weights.low_rank(name)) is not None:  # the router of experts, a small matrix
                        left, right, scaling = low
                        tensor = torch.addmm(tensor, left, right, alpha=scaling)
                    holder[key] = nn.Parameter(tensor, False) if isinstance(empty, nn.Parameter) else tensor
                return usual(*args, **kwargs)
            finally:
                for holder, key, empty, _ in stored:
                    holder[key] = empty

        return forward

    @contextmanager
    def _reading(self, weights: LazyWeights) -> Iterator[None]:
        """Within the block, every module but the head reads these weights when it is called."""
        with ExitStack() as stack:
            for module in self._model.modules():
                if module is self._head or not any(True for _ in self._stored(module)):
                    continue
                if _is_plain(module, nn.Linear):
                    forward: Callable[..., object] = self._linear(module, weights)
                elif is_transposed_linear(module):
                    forward = self._transposed_linear(module, weights)
                elif _is_plain(module, nn.Embedding):
                    forward = self._embedding(module, weights)
                else:
                    forward = self._other(module, weights)
                stack.enter_context(patched_forward(module, forward))
            yield

    @torch.no_grad()
    def head_inputs(self, weights: LazyWeights, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns the input of the output head for a batch: `(rows, tokens, features)`.

        Raises ConfigError for a model that uses a weight without calling the module that holds it, or that changes the
        output of its head in another way than `architecture.logit_options` describes.
        """
        seen: list[Tensor] = []

        def head(x: Tensor) -> Tensor:
            seen.append(x)
            return _ramp(x)

        model_name = type(self._model).__name__
        with self._reading(weights), patched_forward(self._head, head), _RefuseUnreadWeights(model_name):
            logits = self._model(**batch, use_cache=False).logits
        hidden = seen[0] if len(seen) == 1 else None
        if hidden is None or logits.shape != (*hidden.shape[:-1], 1):
            raise ConfigError(f"a {model_name} cannot be verified: its head is not called once with every token")
        if not torch.allclose(logits, self._finished(_ramp(hidden)), rtol=TOLERANCE, atol=TOLERANCE):
            raise ConfigError(f"a {model_name} cannot be verified: it changes its head's logits in an unknown way")
        return hidden

    def _finished(self, logits: Tensor) -> Tensor:
        """Applies the model's scale and softcap to the output of its head, in place."""
        logits.mul_(self._options.get("logit_scale", 1.0))
        softcap = self._options.get("softcap")
        return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)

    @torch.no_grad()
    def logits(self, weights: LazyWeights, hidden: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
        """Yields (first token of the vocabulary, fp64 logits `(rows, up to count)`) for hidden `(rows, features)`."""
        name = self._name_of[id(self._head.weight)]
        bias, low = self._bias(weights, self._head), weights.low_rank(name)
        for first, rows in regrouped_rows(weights.slices(name), count):
            part = slice(first, first + rows.shape[0])
            block = F.linear(hidden, rows, None if bias is None else bias[part])
            if low is not None:
                left, right, scaling = low
                block += scaling * F.linear(F.linear(hidden, right), left[part])
            yield first, self._finished(block.double())
