"""`PackedWeight`: a frozen matrix in one of the packed formats.

bitsandbytes' functions pack and unpack (kernels.py), but its modules are not used: on a CPU with AVX512-BF16 the
forward pass of `Linear4bit`, called once in eval mode, re-packs the weight in place, after which gradients and merges
are silently wrong. Codes and statistics are the same: what is packed here, bitsandbytes unpacks, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from qlora_lite.checks import check_finite
from qlora_lite.errors import QuantizationError
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.formats import (
    UNPACKED,
    either,
    embedding_formats,
    format_named,
    formats_where,
    row_step,
    storage_bytes,
)
from qlora_lite.quantization.kernels import DecodeCopy, Slices, nested_code


class SharedBytes(Protocol):
    """What a weight is a part of whose bytes are in shares of several processes (sharding/units.py)."""

    def need(self) -> None:
        """Makes the buffers of the weight be here."""


def check_packable(weight: Tensor, name: str, format: str, first_row: int = 0) -> None:
    """Raises QuantizationError, naming the tensor, unless it is a matrix of finite floats that the format can hold.

    first_row: number of the first of these rows in the tensor that has the name.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        got = f"{tuple(weight.shape)} of {weight.dtype}"
        raise QuantizationError(f"{name} must be a matrix of floats to be packed; got {got}")
    if weight.numel() == 0:
        raise QuantizationError(f"{name} has no values: {tuple(weight.shape)}; leave it unpacked (skip_modules)")
    largest, limit = check_finite(weight, name, first_row), format_named(format).largest
    if largest > limit:
        wider = either(*formats_where(lambda row: row.largest >= largest), UNPACKED)
        raise QuantizationError(f"{name} reaches {largest:g}, above {limit:g}, the limit of {format}; use {wider}")


class PackedWeight(nn.Module):
    """A frozen matrix of shape `(rows, columns)` in one of the packed formats.

        W_i = code[index_i] * absmax[i // blocksize]      nf4, fp4: i is the position in the flattened weight
        W_ij = index_ij * absmax_i / 127                  int8

    `packed` holds the indices, `absmax` the statistics; with double quantization `absmax` holds 8-bit codes, and the
    fp32 statistic of block b is nested_code[absmax[b]] * nested_absmax[b // 256] + nested_offset. The buffers
    take exactly `storage_bytes()` bytes. They move between devices with the model, and no cast changes them: `.half()`
    or `.to(dtype)` on a model leaves every bit in place. A new instance holds zeros.

    int8_activations: whether `integer_product` multiplies in integers. plain_dtype: the dtype that the weight has
    unpacked in its model, which follows casts of the model. unit: what asks other processes for the bytes before they
    are read, None if they are all here.
    """

    of_checkpoint = True  # False once an initialization such as LoftQ has replaced the checkpoint's values
    unit: SharedBytes | None = None
    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    nested_offset: Tensor
    nested_code: Tensor

    def __init__(
        self,
        shape: tuple[int, int],
        format: str,
        blocksize: int = 64,
        double_quant: bool = True,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        row = format_named(format)
        self.shape, self.format, self.blocksize = torch.Size(shape), format, blocksize
        self.plain_dtype = torch.float32
        self.double_quant = double_quant and row.nests
        self.int8_activations = False
        self._decode_copy: DecodeCopy | None = None
        self._copied: list[tuple[str, Tensor, int]] = []
        for name, buffer in row.buffers(shape, blocksize, double_quant).items():
            if name == "nested_code":  # a constant
                code = torch.tensor(nested_code(), dtype=torch.float32).to(device or "cpu")
                self.register_buffer(name, code, persistent=False)
            else:
                dtype: torch.dtype = getattr(torch, buffer.dtype)
                self.register_buffer(name, torch.zeros(buffer.shape, dtype=dtype, device=device))

    @classmethod
    def of(cls, weight: Tensor, config: QuantConfig, format: str | None = None, name: str = "weight") -> PackedWeight:
        """Packs a matrix. Raises QuantizationError, naming it, for NaN, infinity, or a wrong dtype or shape."""
        check_packable(weight, name, format or config.format)
        new = cls.from_slices(weight.shape, weight.device, [(0, weight.detach())], config, format)
        new.plain_dtype = weight.dtype
        return new

    @classmethod
    def from_slices(
        cls, shape: tuple[int, ...], device: torch.device, slices: Slices, config: QuantConfig, format: str | None
    ) -> PackedWeight:
        """Packs a matrix from (first row, rows) slices, to the same codes as the whole at once.

        Slices begin at multiples of `row_step`; their values must be finite.
        """
        new = cls((shape[0], shape[1]), format or config.format, config.blocksize, config.double_quant, device)
        new.int8_activations = config.int8_activations and new.format == config.format
        narrow = ((first, rows.float() if rows.dtype == torch.float64 else rows) for first, rows in slices)
        format_named(new.format).kernels().pack(new, narrow)
        return new

    @property
    def dtype(self) -> torch.dtype:
        """`plain_dtype`, for models that cast the input of a layer to the dtype of its weight."""
        return self.plain_dtype

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def bits(self) -> int:
        """The bits of one code."""
        return format_named(self.format).bits

    def storage_bytes(self) -> int:
        """Returns the bytes of codes and statistics by the formula; equal to the bytes of the buffers."""
        return storage_bytes(tuple(self.shape), self.format, self.blocksize, self.double_quant)

    def _need_bytes(self) -> None:
        if self.unit is not None:
            self.unit.need()

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Returns the whole matrix in this dtype, as a new tensor."""
        return self.dequantize_rows(0, self.shape[0], dtype)

    @property
    def row_step(self) -> int:
        """The number of rows that together fill whole blocks; a slice of rows must begin at a multiple of it."""
        return row_step(self.shape, self.format, self.blocksize)

    def dequantize_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Returns rows start to stop; start, and stop unless it is the end, are multiples of `row_step`."""
        self._need_bytes()
        return format_named(self.format).kernels().unpack(self, dtype, start, stop)

    def integer_product(self, rows: Tensor) -> Tensor | None:
        """Returns rows W^T in integers if `int8_activations` asks for it and format and shapes allow it, else None."""
        self._need_bytes()
        product = format_named(self.format).kernels().integer_product if self.int8_activations else None
        return None if product is None else product(self, rows)

    def few_rows_product(self, rows: Tensor) -> Tensor | None:
        """Returns rows W^T by a kernel for few rows, None if there is none for this weight and these rows."""
        self._need_bytes()
        product = format_named(self.format).kernels().few_rows
        return None if product is None else product(self, rows)

    @property
    def decode_copy(self) -> DecodeCopy | None:
        """The copy that `set_decode_copy` was given, None without one or if a buffer has changed since."""
        if self._decode_copy is not None:
            for name, buffer, version in self._copied:
                if self._buffers[name] is not buffer or buffer._version != version:
                    self.set_decode_copy(None)
                    break
        return self._decode_copy

    def set_decode_copy(self, copy: DecodeCopy | None) -> None:
        """Sets or drops re-packed codes and statistics for products of few rows (generation/repacked_codes.py)."""
        buffers = () if copy is None else self.named_buffers()
        self._decode_copy, self._copied = copy, [(name, buffer, buffer._version) for name, buffer in buffers]

    def __getstate__(self) -> dict[str, object]:
        """Returns the attributes that a deep copy gets: it has no copy of the codes, which belongs to a block."""
        return {**self.__dict__, "_decode_copy": None, "_copied": []}

    def rows(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns rows by number: tokens of any shape -> `(*tokens.shape, columns)`.

        Raises QuantizationError for a format that does not store rows apart.
        """
        select = format_named(self.format).kernels().select_rows
        if select is None:
            formats = either(*embedding_formats())
            raise QuantizationError(f"rows can be selected from a weight in format {formats}; got {self.format}")
        self._need_bytes()
        return select(self, tokens.reshape(-1)).to(dtype).view(*tokens.shape, self.shape[1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self.plain_dtype = fn(torch.empty(0, dtype=self.plain_dtype)).dtype
        self.set_decode_copy(None)
        return super()._apply(move_only, recurse)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        has_blocks = format_named(self.format).layout.has_blocks
        blocks = f", blocksize={self.blocksize}, double_quant={self.double_quant}" if has_blocks else ""
        return f"{tuple(self.shape)}, format={self.format}{blocks}"
