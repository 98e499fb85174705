"""The tensors of a GGUF file, made from those of a plain checkpoint: names, order of values, and types.

Names come from the map of the `gguf` package. Experts are stacked, one after the other. Values change as the family's
row in families.py says. A tensor whose rows change places is held whole while it is written; others pass in slices.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qlora_lite.checkpoints.safetensors_write import PlannedTensor
from qlora_lite.errors import CheckpointError, listing
from qlora_lite.export.gguf.families import Family
from qlora_lite.export.gguf.library import BLOCK, FLOATS, GgufTensor, tensor_names
from qlora_lite.export.plain_weights import PlainWeight

EMBEDDING, HEAD, HEAD_IN_CHECKPOINT = "token_embd.weight", "output.weight", "lm_head.weight"
EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<index>\d+)\.(?P<part>\w+)\.weight")
QUERY, KEY = re.compile(r".+\.q_proj\.(weight|bias)"), re.compile(r".+\.k_proj\.(weight|bias)")
# Kept in f32 by llama.cpp besides vectors and norms: routers and learned positions.
ROUTERS = re.compile(r"blk\.\d+\.ffn_gate_inp(_shexp)?\.weight")
KEPT_NAMES = re.compile(r".*_norm\.weight|position_embd\.weight")
KEPT_MODULES = (".gate.weight", ".shared_expert_gate.weight", ".wpe.weight")
SHARED_EXPERT_GATE = re.compile(r"blk\.\d+\.ffn_gate_inp_shexp\.weight")
# llama.cpp too packs embedding and head less tightly than to four bits: their errors reach every token.
EMBEDDING_TYPES = {"q4_0": "q8_0"}
UNALIGNED_TYPE = "f16"  # as in llama.cpp's converter


def stays_fp32(weight: PlainWeight) -> bool:
    """Whether a weight of a model is written in fp32 whatever the type of the file."""
    return len(weight.shape) == 1 or weight.name.endswith(KEPT_MODULES)


def tensor_type(name: str, shape: tuple[int, ...], type: str) -> str:
    """Returns the type of a tensor in a file of a type. name: GGUF's."""
    if len(shape) == 1 or not name.endswith(".weight") or ROUTERS.fullmatch(name) or KEPT_NAMES.fullmatch(name):
        return "f32"
    if name in (EMBEDDING, HEAD):
        type = EMBEDDING_TYPES.get(type, type)
    return type if type in FLOATS or shape[-1] % BLOCK == 0 else UNALIGNED_TYPE


def permuted_rows(weight: Tensor, heads: int) -> Tensor:
    """Returns the rows of Q or K, or their biases, with the two values of each rotated pair next to each other.

    transformers rotates value i of a head with value i + size / 2, llama.cpp's `llama` values 2 i and 2 i + 1.
    """
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def turned_heads(name: str, family: Family, config: Any) -> int | None:
    """Returns the heads of a tensor of the checkpoint whose rows have another order in llama.cpp, None for others."""
    if not family.permuted or not (QUERY.fullmatch(name) or KEY.fullmatch(name)):
        return None
    own = config.num_key_value_heads if KEY.fullmatch(name) else config.num_attention_heads
    return int(own or config.num_attention_heads)


def row_order(name: str, family: Family, config: Any) -> Callable[[Tensor], Tensor] | None:
    """Returns what puts the rows of a tensor of the checkpoint, or of an adapter's B, into llama.cpp's order."""
    heads = turned_heads(name, family, config)
    return None if heads is None else functools.partial(permuted_rows, heads=heads)


def is_transposed(name: str, family: Family) -> bool:
    """Whether llama.cpp has the columns of a tensor of the checkpoint as rows."""
    return bool(family.transposed) and name.endswith(family.transposed)


def is_norm_plus_one(name: str, family: Family) -> bool:
    """Whether llama.cpp has 1 + the values of a tensor of the checkpoint."""
    return family.norm_plus_one and name.endswith("norm.weight")


def stack_name(name: str) -> str:
    """Returns the name of the stack that an expert's tensor is a matrix of; of another tensor its own."""
    expert = EXPERT.fullmatch(name)
    return name if expert is None else f"{expert['stack']}.{expert['part']}.weight"


def gguf_tensors(tensors: Mapping[str, PlannedTensor], family: Family, config: Any, type: str) -> list[GgufTensor]:
    """Returns the tensors of a GGUF file.

    tensors: of the plain checkpoint, under the names that transformers saves. Raises CheckpointError for tensors that
    llama.cpp has no place for.
    """
    if not family.own_head and HEAD_IN_CHECKPOINT in tensors:
        raise CheckpointError(
            f"llama.cpp's {family.architecture} has one weight for embedding and head, and the adapter made two of "
            f"them; train neither, or both as one"
        )
    named = tensor_names(family.architecture, config.num_hidden_layers)
    stacks = _by_stack(tensors)
    targets = {name: named(name) for name in stacks}
    unknown = [name for name, target in targets.items() if target is None]
    if unknown:
        raise CheckpointError(
            f"llama.cpp's {family.architecture} has no place for these tensors of the {config.model_type}: "
            f"{listing(unknown, 4)}"
        )
    return [_tensor(name, str(targets[name]), parts, family, config, type) for name, parts in stacks.items()]


def _by_stack(tensors: Mapping[str, PlannedTensor]) -> dict[str, list[PlannedTensor]]:
    """Groups the experts of a stack, in their order; of other tensors each is a group."""
    groups: dict[str, dict[int, PlannedTensor]] = {}
    for name, tensor in tensors.items():
        expert = EXPERT.fullmatch(name)
        groups.setdefault(stack_name(name), {})[0 if expert is None else int(expert["index"])] = tensor
    return {name: [parts[index] for index in sorted(parts)] for name, parts in groups.items()}


def _tensor(name: str, target: str, parts: list[PlannedTensor], family: Family, config: Any, type: str) -> GgufTensor:
    shape = parts[0].shape if ".experts." not in name else (len(parts), *parts[0].shape)
    whole: Callable[[Tensor], Tensor] | None = row_order(name, family, config)
    if is_transposed(name, family):
        whole, shape = torch.t, shape[::-1]
    if SHARED_EXPERT_GATE.fullmatch(target):
        shape = shape[-1:]  # one row
    kept = tensor_type(target, shape, type)
    added = 1.0 if is_norm_plus_one(name, family) else 0.0
    return GgufTensor(target, shape, kept, functools.partial(_pieces, parts, whole, added))


def _pieces(parts: list[PlannedTensor], whole: Callable[[Tensor], Tensor] | None, added: float) -> Iterator[Tensor]:
    for part in parts:
        if whole is None:
            yield from (piece + added if added else piece for piece in part.slices())
            continue
        held, filled = torch.empty(part.shape, dtype=part.dtype), 0
        for piece in part.slices():
            held.view(-1)[filled : filled + piece.numel()] = piece.reshape(-1)
            filled += piece.numel()
        yield whole(held)
