"""`QuantConfig`: how a frozen base is stored. A wrong setting raises ConfigError at construction."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qlora_lite.checks import FLOAT_DTYPES, require
from qlora_lite.quantization.formats import DEFAULT_FORMAT, FORMATS, UNPACKED, either, embedding_formats, formats_where
from qlora_lite.quantization.layouts import check_blocksize


@dataclass(frozen=True)
class QuantConfig:
    """How a frozen base is stored.

    format: of every linear layer that is not skipped: a name in `FORMATS`, or `none` to leave it unpacked.
    blocksize: values per block of the 4-bit formats.
    double_quant: whether the statistics of the 4-bit formats are packed too (QLoRA, section 3).
    compute_dtype: dtype that a packed weight is unpacked to for a product. None follows the layer's input, except for
        bf16 on a CPU without bf16 instructions, where it is fp32.
    int8_activations: with a format whose row has `integer_product` (`int8`), whether layers round their inputs to int8
        by rows and multiply in integers, with columns of large values apart (LLM.int8()). The forward pass is faster,
        and less exact than unpacking the weight. Gradients are computed from the unpacked weight in either case.
    embedding_format: a format whose row has `holds_embeddings` (`int8`) packs input embedding and output head, tied or
        not; `none` leaves them unpacked.
    skip_modules: names of linear layers and experts modules to leave unpacked, whole or their last parts; None skips
        the output head, and of a vision-language model all but the language model.
    """

    format: str = DEFAULT_FORMAT
    blocksize: int = 64
    double_quant: bool = True
    compute_dtype: torch.dtype | None = None
    int8_activations: bool = False
    embedding_format: str = UNPACKED
    skip_modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        known = (*FORMATS, UNPACKED)
        require(self.format in known, f"format must be one of {', '.join(known)}", self.format)
        check_blocksize(self.blocksize)
        require(isinstance(self.double_quant, bool), "double_quant must be True or False", self.double_quant)
        dtypes = (None, *FLOAT_DTYPES.values())
        require(self.compute_dtype in dtypes, "compute_dtype must be None or a 16/32-bit float", self.compute_dtype)
        integers = self.int8_activations
        require(isinstance(integers, bool), "int8_activations must be True or False", integers)
        multiplying = formats_where(lambda row: row.integer_product)
        needed = f"int8_activations need format {either(*multiplying)}"
        require(not integers or self.format in multiplying, needed, self.format)
        embeddings = (*embedding_formats(), UNPACKED)
        choice = f"embedding_format must be {either(*embeddings)}"
        require(self.embedding_format in embeddings, choice, self.embedding_format)
        if self.skip_modules is not None:
            skip = self.skip_modules
            names_only = isinstance(skip, (tuple, list)) and all(isinstance(name, str) for name in skip)
            require(names_only, "skip_modules must be a tuple of module names, or None", skip)
