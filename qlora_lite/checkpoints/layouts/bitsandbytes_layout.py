"""Packed weights in the names and layout of bitsandbytes, in which transformers saves and loads them.

The step of a weight that is packed in the files: checkpoint.py reads it by this file on its way in, and
export/quantized.py writes it on its way out.

A linear layer `X` of shape (out, in), n = out * in, in a 4-bit format:

    X.weight                               uint8 (ceil(n / 2), 1), two codes in a byte
    X.weight.absmax                        fp32 (blocks,), or uint8 with double quantization
    X.weight.quant_map                     fp32 (16,), what the codes stand for
    X.weight.nested_absmax                 fp32 (ceil(blocks / 256),)   } with double
    X.weight.nested_quant_map              fp32 (256,)                  } quantization
    X.weight.quant_state.bitsandbytes__F   F = nf4 or fp4: the bytes of a JSON object with quant_type, blocksize, dtype,
                                           shape; with double quantization nested_blocksize, nested_dtype, nested_offset

and in 8 bits `X.weight` int8 (out, in), `X.SCB` fp32 (out,), the absmax of each row, and `X.weight_format`, 0 for rows.

bitsandbytes has no names for embeddings. An embedding in int8 rows, and a head that shares these, are stored unpacked,
which every reader understands, with the absmax of each row in a separate file (`ROWS_FILE`). The codes can be restored
exactly: bf16 rounds code * absmax / 127 by less than 1 / 256 of it, so 127 * value / absmax is off by less than
127 / 256 and rounds to the code. fp16 is finer, except for values below 2**-14, whose steps are 2**-24
(`int8_rows_recoverable`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_lite.checkpoints.lazy_tensors import READ_BYTES, read_slices
from qlora_lite.checkpoints.safetensors_read import StoredTensor
from qlora_lite.checkpoints.safetensors_write import PlannedTensor, planned
from qlora_lite.checks import check_finite, is_count, is_finite
from qlora_lite.compute.slicing import slices_within
from qlora_lite.errors import CheckpointError, listing
from qlora_lite.quantization.formats import (
    eight_bit_format,
    either,
    format_named,
    formats_where,
    packed_bytes,
    row_step,
)
from qlora_lite.quantization.layouts import BLOCKSIZES, NESTED_BLOCKSIZE
from qlora_lite.quantization.packed_weight import PackedWeight

ROWS_FILE = "int8_rows/absmax.safetensors"
STATE = "quant_state.bitsandbytes__"
STATISTIC_4BIT = re.compile(rf"(.+\.weight)\.(absmax|quant_map|nested_absmax|nested_quant_map|{re.escape(STATE)}\w+)")
STATISTIC_8BIT = re.compile(r"(.+\.)(SCB|weight_format)")
# The names in a file of each buffer of a PackedWeight but the codes.
BUFFERS_4BIT = {"absmax": "absmax"}
BUFFERS_NESTED = {**BUFFERS_4BIT, "nested_absmax": "nested_absmax", "nested_code": "nested_quant_map"}
BUFFERS_8BIT = {"absmax": "SCB"}
# Tables written by other versions differ in the last bits. Kernels use their own table, not the file's.
TABLE_TOLERANCE = 1e-3
LARGEST_CODE = 127
SMALLEST_FP16_ABSMAX = LARGEST_CODE * 2**-24
SHOWN = 8


def _as_tensor(fields: Mapping[str, object]) -> Tensor:
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def _code_values(format: str) -> tuple[float, ...]:
    values = format_named(format).kernels().code_values
    assert values is not None  # every format of the 4-bit layout has a table
    return values(format)


def bitsandbytes_tensors(name: str, packed: PackedWeight, dtype: torch.dtype) -> dict[str, PlannedTensor]:
    """Returns the tensors of a checkpoint for a packed weight, its bytes unchanged.

    name: ends in `weight`. dtype: the one to which bitsandbytes unpacks the weight for a product.
    """
    if format_named(packed.format).bitsandbytes == "8bit":
        layer = name.removesuffix("weight")
        row_major = torch.zeros((), dtype=torch.uint8)
        tensors = {name: packed.packed, f"{layer}SCB": packed.absmax, f"{layer}weight_format": row_major}
        return {key: planned(tensor) for key, tensor in tensors.items()}
    table = torch.tensor(_code_values(packed.format))
    tensors = {name: packed.packed.view(-1, 1), f"{name}.absmax": packed.absmax, f"{name}.quant_map": table}
    kind, shape = str(dtype).removeprefix("torch."), list(packed.shape)
    fields = {"quant_type": packed.format, "blocksize": packed.blocksize, "dtype": kind, "shape": shape}
    if packed.double_quant:
        tensors |= {f"{name}.nested_absmax": packed.nested_absmax, f"{name}.nested_quant_map": packed.nested_code}
        fields |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32"}
        fields |= {"nested_offset": float(packed.nested_offset)}
    tensors[f"{name}.{STATE}{packed.format}"] = _as_tensor(fields)
    return {key: planned(tensor) for key, tensor in tensors.items()}


@dataclass(frozen=True)
class StoredPackedWeight:
    """A packed weight in a file, whose sizes were checked. buffers: by the names of `PackedWeight`'s buffers."""

    name: str
    format: str
    shape: tuple[int, ...]
    blocksize: int
    nested_offset: float | None
    buffers: Mapping[str, StoredTensor]

    @property
    def step(self) -> int:
        return row_step(self.shape, self.format, self.blocksize)

    def empty(self, device: torch.device) -> PackedWeight:
        """Returns an uninitialized packed weight of this layout."""
        nested = self.nested_offset is not None
        return PackedWeight((self.shape[0], self.shape[1]), self.format, self.blocksize, nested, device)

    def load(self, device: torch.device) -> PackedWeight:
        """Reads the packed bytes. Raises QuantizationError for statistics that are NaN or infinite."""
        packed = self.empty(device)
        for key, stored in self.buffers.items():
            flat, offset = getattr(packed, key).view(-1), 0
            for first, rows in read_slices(stored, READ_BYTES):
                if key != "packed":  # codes may be stored as floats of the same bytes
                    check_finite(rows, stored.name, first)
                part = rows.reshape(-1).view(flat.dtype)
                flat[offset : offset + part.numel()] = part
                offset += part.numel()
        if self.nested_offset is not None:
            packed.nested_offset.fill_(self.nested_offset)
        return packed


@dataclass(frozen=True)
class StoredInt8Rows:
    """An int8 matrix that is stored unpacked, with the absmax of its rows, from which its codes are restored."""

    stored: StoredTensor
    absmax: StoredTensor
    step = 1

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def empty(self, device: torch.device) -> PackedWeight:
        """Returns a packed weight of this layout that holds zeros."""
        return PackedWeight((self.shape[0], self.shape[1]), eight_bit_format().name, device=device)

    def load(self, device: torch.device) -> PackedWeight:
        """Restores the packed weight. Raises CheckpointError if the absmax was written for other rows."""
        return self.load_rows(0, self.shape[0], device)

    def load_rows(self, start: int, stop: int, device: torch.device) -> PackedWeight:
        """Restores rows start to stop, as `load` does."""
        absmax = self.absmax.rows(start, stop)
        check_finite(absmax, f"the absmax of {self.name}", start)
        packed = PackedWeight((stop - start, self.shape[1]), eight_bit_format().name, device=device)
        packed.absmax.copy_(absmax)
        scale = torch.where(absmax > 0, LARGEST_CODE / absmax, 0).unsqueeze(1)
        for part in slices_within(packed.shape, torch.float32.itemsize, READ_BYTES):
            rows = self.stored.rows(start + part.start, start + part.stop)
            codes = (rows.float() * scale[part]).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
            packed.packed[part] = codes  # (NaN becomes an arbitrary code, and differs below)
            if not torch.equal(packed.dequantize_rows(part.start, part.stop, rows.dtype).cpu(), rows):
                raise CheckpointError(
                    f"{self.name} has other rows than {self.absmax.path} was written for; save the checkpoint again"
                )
        return packed


def int8_rows_recoverable(absmax: Tensor, dtype: torch.dtype) -> bool:
    """Whether the int8 codes of rows with these absmax can be restored exactly from values in `dtype`."""
    return dtype != torch.float16 or not bool(((absmax > 0) & (absmax <= SMALLEST_FP16_ABSMAX)).any())


def stored_int8_rows(
    stored: Mapping[str, StoredTensor], absmax: Mapping[str, StoredTensor]
) -> dict[str, StoredInt8Rows]:
    """Returns the matrices that have an entry in the file of absmax. Raises CheckpointError listing mismatches."""
    bad = [
        name
        for name, rows in absmax.items()
        if name not in stored
        or not stored[name].dtype.is_floating_point
        or len(stored[name].shape) != 2
        or (rows.shape, rows.dtype) != (stored[name].shape[:1], torch.float32)
    ]
    if bad:
        raise CheckpointError(f"{ROWS_FILE} has no matching rows in the checkpoint for {listing(sorted(bad), SHOWN)}")
    return {name: StoredInt8Rows(stored[name], rows) for name, rows in absmax.items()}


def stored_packed_weights(stored: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredPackedWeight], set[str]]:
    """Returns the weights that bitsandbytes packed, by name, and the names of their statistics.

    Raises one CheckpointError that lists every weight whose statistics are missing, damaged, or of a wrong size.
    """
    four: dict[str, dict[str, StoredTensor]] = {}
    eight: dict[str, dict[str, StoredTensor]] = {}
    statistics: set[str] = set()
    for name, tensor in stored.items():
        if match := STATISTIC_4BIT.fullmatch(name):
            four.setdefault(match[1], {})[match[2]] = tensor
        elif match := STATISTIC_8BIT.fullmatch(name):
            eight.setdefault(f"{match[1]}weight", {})[match[2]] = tensor
        else:
            continue
        statistics.add(name)
    problems: list[str] = []
    groups = [(_four_bit, name, parts) for name, parts in four.items()]
    groups += [(_eight_bit, name, parts) for name, parts in eight.items()]
    read = {name: _read(layout, name, stored, parts, problems) for layout, name, parts in groups}
    if problems:
        raise CheckpointError(f"packed weights cannot be read: {listing(problems, SHOWN, '; ')}")
    return {name: weight for name, weight in read.items() if weight is not None}, statistics


def _read(
    layout: Callable[..., StoredPackedWeight],
    name: str,
    stored: Mapping[str, StoredTensor],
    parts: Mapping[str, StoredTensor],
    problems: list[str],
) -> StoredPackedWeight | None:
    """Returns a weight in one of the layouts; None, after appending to `problems`, if it is damaged."""
    try:
        return _checked(layout(name, stored, parts))
    except CheckpointError as error:
        problems.append(str(error))
        return None


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise CheckpointError(problem)


def _named(
    name: str, stored: Mapping[str, StoredTensor], parts: Mapping[str, StoredTensor], names: Mapping[str, str]
) -> dict[str, StoredTensor]:
    """Returns the stored tensor of each buffer. Raises CheckpointError listing missing ones."""
    missing = [part for part in names.values() if part not in parts]
    missing = [*(["the weight itself"] if name not in stored else []), *missing]
    _require(not missing, f"{name} misses {', '.join(missing)}")
    return {"packed": stored[name], **{buffer: parts[part] for buffer, part in names.items()}}


def _quant_state(state: StoredTensor) -> dict[str, Any]:
    """Reads the JSON object that bitsandbytes stores as a tensor."""
    try:
        fields = json.loads(bytes(state.read().view(-1).view(torch.uint8).numpy()))
    except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError too
        raise CheckpointError(f"{state.name} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{state.name} should be a JSON object; got a {type(fields).__name__}")
    return fields


def _four_bit(name: str, stored: Mapping[str, StoredTensor], parts: Mapping[str, StoredTensor]) -> StoredPackedWeight:
    states = [part for part in parts if part.startswith(STATE)]
    formats = formats_where(lambda row: row.bitsandbytes == "4bit")
    choice = either(*(STATE + format for format in formats))
    _require(len(states) == 1, f"{name} should have one {choice}; got {', '.join(states) or 'none'}")
    state = parts[states[0]]
    fields, format = _quant_state(state), states[0].removeprefix(STATE)
    nested = any(key.startswith("nested_") for key in (*fields, *parts))
    checks: dict[str, Callable[[Any], bool]] = {
        "quant_type": lambda value: value == format and format in formats,
        "blocksize": lambda value: is_count(value, 1) and value in BLOCKSIZES,
        "shape": lambda value: isinstance(value, list) and len(value) == 2 and all(is_count(n, 1) for n in value),
    }
    if nested:
        checks |= {"nested_blocksize": lambda value: value == NESTED_BLOCKSIZE, "nested_offset": is_finite}
    bad = [f"{key} {fields.get(key)!r}" for key, check in checks.items() if not check(fields.get(key))]
    _require(not bad, f"{state.name} has {', '.join(bad)}")
    buffers = _named(name, stored, parts, BUFFERS_NESTED if nested else BUFFERS_4BIT)
    _check_table(name, format, parts.get("quant_map"))
    offset = float(fields["nested_offset"]) if nested else None
    return StoredPackedWeight(name, format, tuple(fields["shape"]), fields["blocksize"], offset, buffers)


def _check_table(name: str, format: str, table: StoredTensor | None) -> None:
    ours = torch.tensor(_code_values(format))
    _require(table is not None, f"{name} misses quant_map")
    same = table is not None and table.shape == tuple(ours.shape) and table.dtype == ours.dtype
    same = same and table is not None and torch.allclose(table.read(), ours, rtol=0, atol=TABLE_TOLERANCE)
    _require(same, f"{name}.quant_map is not the table of {format}")


def _eight_bit(name: str, stored: Mapping[str, StoredTensor], parts: Mapping[str, StoredTensor]) -> StoredPackedWeight:
    buffers = _named(name, stored, parts, BUFFERS_8BIT)
    layout = parts.get("weight_format")
    order = 0 if layout is None else int(layout.read().sum())  # older files have none, and are laid out by rows
    _require(order == 0, f"{name} is laid out for one kind of accelerator (weight_format {order}), not by rows")
    shape = buffers["packed"].shape
    _require(len(shape) == 2, f"{name} should be a matrix; got {shape}")
    return StoredPackedWeight(name, eight_bit_format().name, shape, BLOCKSIZES[0], None, buffers)


def _checked(weight: StoredPackedWeight) -> StoredPackedWeight:
    """Returns the weight. Raises CheckpointError if a tensor differs from its buffer in size or dtype."""
    codes, needed = weight.buffers["packed"], packed_bytes(weight.shape, weight.format)
    got = math.prod(codes.shape) * codes.dtype.itemsize
    _require(got == needed, f"{weight.name} has {got:,} bytes, {weight.format} of {weight.shape} needs {needed:,}")
    layout = weight.empty(torch.device("meta"))
    wrong = []
    for key, stored in weight.buffers.items():
        buffer: Tensor = getattr(layout, key)
        # 4-bit codes may be stored as another dtype of the same bytes (bnb_4bit_quant_storage).
        as_bytes = key == "packed" and format_named(weight.format).bitsandbytes == "4bit"
        size = math.prod(stored.shape) * stored.dtype.itemsize
        if size != buffer.nbytes or not (as_bytes or stored.dtype == buffer.dtype):
            wrong.append(f"{stored.name} is {_layout(stored)}, {buffer.numel():,} of {buffer.dtype} are needed")
    _require(not wrong, "; ".join(wrong))
    return weight


def _layout(stored: StoredTensor) -> str:
    return f"{stored.shape} of {stored.dtype}"
