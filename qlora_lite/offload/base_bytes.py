"""How much of a base lies on disk, how much of that is resident, and how much a step reads, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.offload.mapped_file import LEAST_BYTES
from qlora_lite.surgery import repeated_blocks

CODES = "packed"  # the buffer of a packed weight beside which others are its statistics


@dataclass(frozen=True)
class BaseBytes:
    """Bytes of a model's frozen tensors that lie on disk.

    codes: of packed codes and plain tensors. statistics: of packed weights. largest_block: codes and statistics of the
    largest block. outside: of what is outside of the blocks. by_rows: of that, of an input embedding of which single
    rows are read.
    """

    codes: int
    statistics: int
    largest_block: int
    outside: int
    by_rows: int

    @classmethod
    def of(cls, model: nn.Module) -> BaseBytes:
        """Returns the bytes that `DiskSource` finds if the model is packed to disk; the model may be fake."""
        blocks = list(dict.fromkeys(repeated_blocks(model)))
        sizes = [sum(tensor.nbytes for _, tensor in _large(block)) for block in blocks]
        every = list(_large(model))
        total = sum(tensor.nbytes for _, tensor in every)
        statistics = sum(tensor.nbytes for is_statistic, tensor in every if is_statistic)
        ends = [architecture.input_embedding(model), architecture.output_head(model)]
        embedding, head = ([tensor for _, tensor in _large(end)] if end is not None else [] for end in ends)
        rows = sum(tensor.nbytes for tensor in embedding if not any(tensor is other for other in head))
        return cls(total - statistics, statistics, max(sizes, default=0), total - sum(sizes), rows)

    @property
    def total(self) -> int:
        return self.codes + self.statistics

    @property
    def resident(self) -> int:
        """The most that is resident at a time: two blocks, or the output head and the like."""
        return max(min(2 * self.largest_block, self.total - self.outside), self.outside - self.by_rows)

    @property
    def read_a_batch(self) -> int:
        """What is read for forward and backward of a batch, if nothing is in the page cache: at most so much."""
        return 2 * (self.total - self.outside) + self.outside - self.by_rows

    def with_more_layers(self, one_more: BaseBytes, layers: int) -> BaseBytes:
        """Returns the bytes of a model with `layers` more layers. one_more: those with one more."""
        codes = self.codes + (one_more.codes - self.codes) * layers
        statistics = self.statistics + (one_more.statistics - self.statistics) * layers
        return BaseBytes(codes, statistics, one_more.largest_block, self.outside, self.by_rows)


def _large(model: nn.Module) -> Iterator[tuple[bool, Tensor]]:
    """Yields (whether it holds statistics, tensor) for each large frozen tensor of floats or of a packed weight."""
    seen: set[int] = set()
    for module in model.modules():
        is_packed = CODES in module._buffers
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is None or id(tensor) in seen or tensor.requires_grad or tensor.nbytes < LEAST_BYTES:
                continue
            if is_packed or (tensor.is_floating_point() and name in module._parameters):
                seen.add(id(tensor))
                yield is_packed and name != CODES, tensor
