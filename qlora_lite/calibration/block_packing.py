"""Packs a model block by block, for the text that runs through it; a block at a time is in full precision.

For each block, in the order of the forward pass: its weights are read; the text runs through it in the 16-bit model and
behind the packed blocks; the weight of each layer is packed for the inputs that it got (error_feedback.py); and the
text runs through the packed block. Between blocks, only hidden states are kept, in the dtype of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.calibration.block_chain import BlockChain, Recorded
from qlora_lite.calibration.error_feedback import pack_with_feedback
from qlora_lite.calibration.layer_inputs import BlockInputs, noted_inputs
from qlora_lite.calibration.report import LayerErrors
from qlora_lite.checkpoints.load import OpenedCheckpoint, TensorLoader
from qlora_lite.progress.work import Work
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.formats import format_named
from qlora_lite.quantization.layers import QuantizedLinear
from qlora_lite.quantization.packed_weight import PackedWeight
from qlora_lite.quantization.quantize_model import WeightToPack, pack_
from qlora_lite.signals import check_signals

OUTSIDE = "outside of the blocks that text passes through"
INCOMPLETE = "not called once with every token"


def layer_name(to_pack: WeightToPack) -> str:
    """Returns the name of the layer, or of the stack."""
    return to_pack.name.removesuffix(".weight")


@dataclass
class Text:
    """A batch on its way through the blocks, as hidden states behind the last one.

    rounded: behind rounded blocks; None for a batch that is calibrated on.
    """

    batch: Mapping[str, Tensor]
    recorded: Recorded
    plain: Tensor
    packed: Tensor
    rounded: Tensor | None


@dataclass
class BlockPacker:
    """Fills an empty model with the tensors of a checkpoint, and packs its blocks for the text that runs through them.

    errors: of the layers that were packed with feedback. left: those packed by rounding, with the reason.
    """

    opened: OpenedCheckpoint
    loader: TensorLoader
    device: torch.device
    targets: Mapping[str, Tensor]
    errors: dict[str, LayerErrors] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    @property
    def config(self) -> QuantConfig:
        return self.opened.checkpoint.config

    def load_around_(self, blocks: Sequence[nn.Module]) -> None:
        """Loads the tensors that are in none of these blocks, packed by rounding where they are to be."""
        inside = {name for block in blocks for name in self._names_in(block)}
        for name in self.opened.checkpoint.tensors:
            if name not in inside:
                check_signals()
                target = self.targets[name]
                if (to_pack := self.loader.to_pack.get(target)) is not None:
                    self.left[layer_name(to_pack)] = OUTSIDE
                self.loader.load_(name, target)
        architecture.fill_computed_buffers_(self.opened.model, self.device)

    def _names_in(self, block: nn.Module) -> list[str]:
        """Returns the names of the checkpoint's tensors that a block has, and that are not loaded yet."""
        held = {id(tensor) for tensor in block.state_dict(keep_vars=True).values()}
        return [name for name in self.opened.checkpoint.tensors if id(self.targets[name]) in held]

    def load_unused_(self, block: nn.Module) -> None:
        """Loads a block that text does not pass through, packed by rounding where it is to be."""
        for name, to_pack in self.load_block_(block).items():
            self.left[name] = OUTSIDE
            pack_(self.opened.model, to_pack, self.config)

    def layer_count(self, blocks: Sequence[nn.Module]) -> int:
        """Returns the number of weights to pack in these blocks."""
        inside = {id(tensor) for block in blocks for tensor in block.state_dict(keep_vars=True).values()}
        return sum(id(weight) in inside for weight in self.loader.to_pack)

    @staticmethod
    def text(chain: BlockChain, batch: Mapping[str, Tensor], held_out: bool) -> Text:
        """Returns a batch at its start, before the first block."""
        recorded = chain.record(batch)
        return Text(batch, recorded, *2 * (recorded.hidden,), recorded.hidden if held_out else None)

    def load_block_(self, block: nn.Module) -> dict[str, WeightToPack]:
        """Loads the tensors of a block unpacked; returns the weights to pack by the name of the layer or stack."""
        found: dict[str, WeightToPack] = {}
        for name in self._names_in(block):
            check_signals()
            target = self.targets[name]
            self.loader.load_plain_(name, target)
            if (to_pack := self.loader.to_pack.get(target)) is not None:
                weight = to_pack.first[1]._parameters[to_pack.stack or "weight"]
                found[layer_name(to_pack)] = replace(to_pack, weight=cast(Tensor, weight))
        return found

    def unsuitable(self, to_pack: WeightToPack) -> str | None:
        """Returns why a weight is packed by rounding whatever its inputs are; None if it is not."""
        shape = to_pack.weight.mT.shape if to_pack.transposed else to_pack.weight.shape
        if to_pack.stack is not None:
            return "a stack of experts' matrices"
        if len(to_pack.modules) > 1:
            return "shares its weight with another layer"
        if not format_named(to_pack.format).layout.has_blocks:
            return f"packed as {to_pack.format}"
        if shape[1] % self.config.blocksize:
            return f"{shape[1]} columns are not a multiple of the block size {self.config.blocksize}"
        return None

    def run_plain(self, block: nn.Module, number: int, texts: Sequence[Text], inputs: BlockInputs) -> None:
        """Runs the text through a block in full precision, and adds the inputs of its layers."""
        for text in texts:
            check_signals()
            call = text.recorded.calls[number]
            with noted_inputs(inputs.layers) as plain:
                output = call.run(block, text.plain)
            if text.rounded is None:
                packed = plain
                if text.packed is not text.plain:
                    with noted_inputs(inputs.layers) as packed:
                        call.run(block, text.packed)
                inputs.add(plain, packed, text.batch)
            text.plain = output

    def run_rounded(self, block: nn.Module, number: int, texts: Sequence[Text]) -> None:
        """Runs the held-out text through a block that is packed by rounding."""
        for text in texts:
            if text.rounded is not None:
                check_signals()
                text.rounded = text.recorded.calls[number].run(block, text.rounded)

    def run_packed(self, block: nn.Module, number: int, texts: Sequence[Text]) -> None:
        """Runs the text through a block that is packed with feedback."""
        for text in texts:
            check_signals()
            text.packed = text.recorded.calls[number].run(block, text.packed)

    def pack_block_(self, block: nn.Module, number: int, texts: Sequence[Text], work: Work) -> None:
        """Packs a block, and runs the text through it."""
        model, found = self.opened.model, self.load_block_(block)
        reasons = {name: self.unsuitable(to_pack) for name, to_pack in found.items()}
        layers = {name: to_pack.first[1] for name, to_pack in found.items() if reasons[name] is None}
        inputs = BlockInputs(layers)
        self.run_plain(block, number, texts, inputs)
        packed: dict[str, PackedWeight] = {}
        for leader, names in inputs.complete().items():
            products = inputs.products.pop(leader)
            order = products.order(self.config.blocksize)
            for name in names:
                to_pack = found[name]
                weight = to_pack.weight.mT if to_pack.transposed else to_pack.weight
                done = pack_with_feedback(weight, products, order, self.config, to_pack.format, to_pack.name)
                packed[name] = done.packed
                self.errors[name] = LayerErrors(done.rounded, done.calibrated)
                work.reach(work.done + 1, self.figures())
        for name, to_pack in found.items():
            if name not in packed:
                self.left[name] = reasons[name] or INCOMPLETE
                work.advance()
            pack_(model, to_pack, self.config)
        self.run_rounded(block, number, texts)
        for name, codes in packed.items():
            cast(QuantizedLinear, model.get_submodule(name)).weight = codes
        self.run_packed(block, number, texts)

    def figures(self) -> str:
        """Returns how much of the error of rounding is left, over all layers so far."""
        return f"error {sum(e.ratio for e in self.errors.values()) / len(self.errors):.0%} of rounding's"
