"""A model of which no weight stays in memory: each is read when its module is called, some rows at a time, and let go.

    y = W x  =  [W_1 x; W_2 x; ...]      W_i: slices of the rows of W, from memory, packed, or on disk

Linear and embedding layers are computed slice by slice, so neither a large layer nor a large vocabulary is ever whole;
other modules (norms, stacked experts) have their tensors for the length of one call. Everything is fp32 on the CPU:
products of fp16 are slow there, and rounding of activations would hide differences between weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

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

# Two orders of fp32 operations on one number.
SAME = 1e-5


@dataclass(frozen=True)
class LazyWeights:
    """What a model computes with, by the names of a plain checkpoint.

    tensors: each gives slices of its rows, in order, together all of them. deltas: scaling * B A that are applied
    apart from the weight of that name, y = W x + scaling * B (A x).
    """

    tensors: Mapping[str, Callable[[], Iterable[Tensor]]]
    deltas: Mapping[str, Delta] = field(default_factory=dict)

    def slices(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows), floats in fp32."""
        first = 0
        for rows in self.tensors[name]():
            check_signals()
            yield first, rows.to("cpu", torch.float32 if rows.is_floating_point() else rows.dtype)
            first += rows.shape[0] if rows.dim() else 1

    def whole(self, name: str) -> Tensor:
        pieces = [rows for _, rows in self.slices(name)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def low_rank(self, name: str) -> tuple[Tensor, Tensor, float] | None:
        """(left, right, scaling) of the delta of this weight, if it has one."""
        delta = self.deltas.get(name)
        return None if delta is None else (delta.left.cpu(), delta.right.cpu(), delta.scaling)


class _NoneUnread(TorchDispatchMode):
    """Refuses operations on weights that were not read.

    torch itself does not: a product of a CPU tensor and one on meta is whatever the memory holds.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(value, Tensor) and value.is_meta for value in tree_leaves((args, kwargs))):
            raise ConfigError(
                f"a {self._kind} cannot be verified: it uses a weight without calling the module that holds it"
            )
        return func(*args, **(kwargs or {}))


def _ramp(x: Tensor) -> Tensor:
    """One logit for each row of x, as a model may have them: what the model makes of these tells of all."""
    rows = x.shape[:-1]
    return torch.linspace(-20, 20, rows.numel()).view(*rows, 1)


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    return isinstance(module, kind) and not has_own_forward(module) and getattr(module, "max_norm", None) is None


class LazyModel:
    """A transformers model on the meta device, called with the weights that it is given for that call.

    `names`: what the checkpoint has; a tied weight is read under the one of its names that is there. Raises
    ConfigError for a model without a plain linear output head.
    """

    def __init__(self, model: Any, names: Iterable[str]) -> None:
        head = architecture.output_head(model)
        if head is None or not _is_plain(head, nn.Linear):
            got = "none" if head is None else type(head).__name__
            raise ConfigError(f"only a model with a plain linear output head can be verified; this head is {got}")
        self._model, self._head, self._options = model, head, architecture.logit_options(model)
        architecture.fill_computed_buffers_(model, torch.device("cpu"))
        there = set(names)
        self._name_of: dict[int, str] = {
            id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items() if name in there
        }

    def _stored(self, module: nn.Module) -> Iterator[tuple[dict[str, Any], str, str]]:
        """(where it stands, key, name in the checkpoint) of what this module itself holds."""
        stores: Any = (module._parameters, module._buffers)
        for store in stores:
            for key, tensor in store.items():
                if tensor is not None and id(tensor) in self._name_of:
                    yield store, key, self._name_of[id(tensor)]

    def _bias(self, weights: LazyWeights, module: Any) -> Tensor | None:
        return None if module.bias is None else weights.whole(self._name_of[id(module.bias)])

    def _linear(self, module: Any, weights: LazyWeights) -> Callable[[Tensor], Tensor]:
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

    def _embedding(self, module: Any, weights: LazyWeights) -> Callable[[Tensor], Tensor]:
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
        """y = x W + bias, as GPT-2 has it: W is `(in, out)`, and each of its slices adds to all of y."""
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

    def _other(self, module: nn.Module, weights: LazyWeights) -> Callable[..., Any]:
        usual = module.forward
        if adapted := [name for _, _, name in self._stored(module) if weights.low_rank(name) is not None]:
            raise ConfigError(f"{adapted[0]} has an adapter on a {type(module).__name__}, which cannot be verified")

        def forward(*given: Any, **named: Any) -> Any:
            stored = [(store, key, store[key], name) for store, key, name in self._stored(module)]
            try:
                for store, key, empty, name in stored:
                    tensor = weights.whole(name).view(empty.shape)  # a stack comes as the rows of its matrices
                    store[key] = nn.Parameter(tensor, False) if isinstance(empty, nn.Parameter) else tensor
                return usual(*given, **named)
            finally:
                for store, key, empty, _ in stored:
                    store[key] = empty

        return forward

    @contextmanager
    def _reading(self, weights: LazyWeights) -> Iterator[None]:
        """Within the block every module but the head reads these weights when it is called."""
        with ExitStack() as stack:
            for module in self._model.modules():
                if module is self._head or not any(True for _ in self._stored(module)):
                    continue
                if _is_plain(module, nn.Linear):
                    forward: Callable[..., Any] = self._linear(module, weights)
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
        """What the output head is given for this batch: `(rows, tokens, features)`.

        ConfigError for a model that reads a weight other than by calling the module which holds it, or that makes
        something else of its head's output than `hub.logit_options` says.
        """
        seen: list[Tensor] = []

        def head(x: Tensor) -> Tensor:
            seen.append(x)
            return _ramp(x)

        kind = type(self._model).__name__
        with self._reading(weights), patched_forward(self._head, head), _NoneUnread(kind):
            made = self._model(**batch, use_cache=False).logits
        hidden = seen[0] if len(seen) == 1 else None
        if hidden is None or made.shape != (*hidden.shape[:-1], 1):
            raise ConfigError(f"a {kind} cannot be verified: its head is not called once with every token")
        if not torch.allclose(made, self._finished(_ramp(hidden)), rtol=SAME, atol=SAME):
            raise ConfigError(f"a {kind} cannot be verified: it changes its head's logits in a way not known here")
        return hidden

    def _finished(self, logits: Tensor) -> Tensor:
        """What the model makes of the output of its head; in place."""
        logits.mul_(self._options.get("logit_scale", 1.0))
        softcap = self._options.get("softcap")
        return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)

    @torch.no_grad()
    def logits(self, weights: LazyWeights, hidden: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
        """(first token of the vocabulary, logits `(rows, at most count)` in fp64) of hidden `(rows, features)`."""
        name = self._name_of[id(self._head.weight)]
        bias, low = self._bias(weights, self._head), weights.low_rank(name)
        for first, rows in regrouped_rows(weights.slices(name), count):
            part = slice(first, first + rows.shape[0])
            block = F.linear(hidden, rows, None if bias is None else bias[part])
            if low is not None:
                left, right, scaling = low
                block += scaling * F.linear(F.linear(hidden, right), left[part])
            yield first, self._finished(block.double())
