"""Stacks of experts in MXFP4, as gpt-oss was released: unpacked while they are read, a slice at a time.

A stack `X` of shape (experts, in, out) is stored as two tensors of bytes. 32 values that follow one another along `in`
share a scale:

    X_blocks   uint8 (experts, out, in / 32, 16)   two E2M1 codes in a byte, the first value in the low half
    X_scales   uint8 (experts, out, in / 32)       E8M0: 2 ** (scale - 127); 255 stands for NaN

    X[e, i, o] = E2M1[code of (e, o, i)] * 2 ** (X_scales[e, o, i // 32] - 127)

(OCP Microscaling Formats, version 1.0.) bf16 holds a value whose exponent it has exactly. Unpacked, the checkpoint is
an ordinary one in bf16, under the names of gpt-oss's bf16 checkpoints: it is packed as asked, and exported as such.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_lite.checkpoints.lazy_tensors import LazyTensor, transposed
from qlora_lite.errors import CheckpointError, listing

METHOD = "mxfp4"
BLOCKS, SCALES = "_blocks", "_scales"
GROUP = 32  # values that share a scale
GROUP_BYTES = GROUP // 2
EXPONENT_BIAS = 127
# The values of the codes 0 to 7; 8 to 15 are their negatives.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SHOWN = 8


def _pairs(device: torch.device) -> Tensor:
    """Returns the two values that each byte stands for: 256 times two bf16, each pair as one int32."""
    values = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.bfloat16, device=device)
    low, high = values.repeat(len(values)), values.repeat_interleave(len(values))
    return torch.stack([low, high], dim=-1).view(torch.int32).view(-1)


def unpacked(blocks: Tensor, scales: Tensor) -> Tensor:
    """Returns values in bf16, of shape (..., groups * 32), from blocks (..., groups, 16) and scales (..., groups)."""
    # One element is looked up for two values, which takes a twentieth of the time of two tables and torch.ldexp.
    pairs = _pairs(blocks.device).index_select(0, blocks.reshape(-1).int())
    grouped = pairs.view(torch.bfloat16).view(*scales.shape, GROUP)
    factors = torch.exp2(scales.float() - EXPONENT_BIAS).to(torch.bfloat16)  # exact, also below the normal range
    return grouped.mul_(factors.unsqueeze(-1)).flatten(-2)


@dataclass(frozen=True)
class _Matrix:
    """A matrix (out, in) of a stack."""

    name: str
    blocks: LazyTensor
    scales: LazyTensor

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.scales.shape[:-1], self.scales.shape[-1] * GROUP)

    def rows(self, start: int, stop: int) -> Tensor:
        return unpacked(self.blocks.rows(start, stop), self.scales.rows(start, stop))

    def select(self, index: int) -> LazyTensor:
        return _Matrix(f"{self.name}[{index}]", self.blocks.select(index), self.scales.select(index))


@dataclass(frozen=True)
class UnpackedStack:
    """A stack in MXFP4 as the plain tensor (experts, in, out) that a bf16 checkpoint has in its place."""

    name: str
    blocks: LazyTensor
    scales: LazyTensor

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def shape(self) -> tuple[int, ...]:
        experts, out, groups = self.scales.shape
        return (experts, groups * GROUP, out)

    def rows(self, start: int, stop: int) -> Tensor:
        return unpacked(self.blocks.rows(start, stop), self.scales.rows(start, stop)).transpose(1, 2)

    def select(self, index: int) -> LazyTensor:
        """Returns the matrix (in, out) of an expert. Transposed again, it is read by the rows that are in the file."""
        return transposed(_Matrix(f"{self.name}[{index}]", self.blocks.select(index), self.scales.select(index)))


def unpacked_tensors(stored: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Returns the tensors of a checkpoint with each pair of blocks and scales as the plain stack that they stand for.

    Raises one CheckpointError that lists every tensor without its other half, or whose shapes do not fit together.
    """
    plain: dict[str, LazyTensor] = {}
    problems: list[str] = []
    for name, tensor in stored.items():
        stack = name.removesuffix(BLOCKS)
        if name.endswith(SCALES) and tensor.dtype == torch.uint8:
            if f"{name.removesuffix(SCALES)}{BLOCKS}" not in stored:
                problems.append(f"{name} has no {BLOCKS[1:]}")
        elif stack == name or tensor.dtype != torch.uint8:
            plain[name] = tensor
        elif (scales := stored.get(f"{stack}{SCALES}")) is None:
            problems.append(f"{name} has no {SCALES[1:]}")
        elif problem := _problem(tensor, scales):
            problems.append(problem)
        elif stack in stored:
            problems.append(f"{stack} is there twice, in {METHOD} and plain")
        else:
            plain[stack] = UnpackedStack(stack, tensor, scales)
    if problems:
        raise CheckpointError(f"weights in {METHOD} cannot be read: {listing(problems, SHOWN, '; ')}")
    return plain


def _problem(blocks: LazyTensor, scales: LazyTensor) -> str | None:
    """Describes how blocks and scales do not fit together; None if they do."""
    fits = len(blocks.shape) == 4 and blocks.shape == (*scales.shape, GROUP_BYTES) and scales.dtype == torch.uint8
    if fits and 0 not in blocks.shape:
        return None
    return (
        f"{blocks.name} {blocks.shape} and {scales.name} {scales.shape} of {scales.dtype} should be (experts, out, "
        f"groups, {GROUP_BYTES}) and (experts, out, groups) of bytes"
    )
