"""Frozen weights in 4 or 8 bits: formats, packed weights and layers, and packing a model in place.

In reading order:

layouts             buffers of a packed weight, by blocks or by rows
formats             one row per format: bits, layout, kernels, names in files
config              QuantConfig
pack_4bit           the nearest 4-bit code of each value, by table
int8_matmul         products of int8 activations and int8 weights
kernels             functions that pack and unpack the layouts
packed_weight       PackedWeight: packs a matrix, unpacks some of its rows
layers              QuantizedLinear and QuantizedEmbedding
experts             stacks of experts' matrices, packed or dense, and the module that calls them
from_bitsandbytes   layers that bitsandbytes packed, taken over
selection           which layers are packed, and which are left unpacked and why
quantize_model      quantize_base_: packs every linear layer of a model
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.quantization.config import QuantConfig as QuantConfig
    from qlora_lite.quantization.experts import DenseStack as DenseStack
    from qlora_lite.quantization.experts import PackedStack as PackedStack
    from qlora_lite.quantization.experts import RoutedExperts as RoutedExperts
    from qlora_lite.quantization.formats import FORMATS as FORMATS
    from qlora_lite.quantization.formats import format_named as format_named
    from qlora_lite.quantization.formats import storage_bytes as storage_bytes
    from qlora_lite.quantization.layers import QuantizedEmbedding as QuantizedEmbedding
    from qlora_lite.quantization.layers import QuantizedLinear as QuantizedLinear
    from qlora_lite.quantization.packed_weight import PackedWeight as PackedWeight
    from qlora_lite.quantization.quantize_model import quantize_base_ as quantize_base_
    from qlora_lite.quantization.selection import left_unpacked as left_unpacked

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "config": "QuantConfig",
        "quantize_model": "quantize_base_",
        "packed_weight": "PackedWeight",
        "layers": "QuantizedLinear QuantizedEmbedding",
        "experts": "PackedStack DenseStack RoutedExperts",
        "selection": "left_unpacked",
        "formats": "FORMATS format_named storage_bytes",
    },
)
