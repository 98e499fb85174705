"""Packs a model block by block, for the text that runs through it; a block at a time is in full precision.

For each block, in the order of the forward pass: its weights are read, and the text runs through it in the 16-bit
model. Then its layers are packed one after the other, those with one input together, for the inputs that they get
behind the layers that are packed already (error_feedback.py), and the text runs through the packed block. Between
blocks, only hidden states are kept, in the dtype of the model.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.calibration.block_chain import BlockChain, Recorded
from qlora_lite.calibration.error_feedback import FeedbackResult, empty_like, pack_with_feedback
from qlora_lite.calibration.input_products import InputProducts
from qlora_lite.calibration.kept_blocks import KeptBlocks, KeptLayer
from qlora_lite.calibration.layer_inputs import BlockInputs, input_of, noted_inputs, token_rows
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


def _weight(to_pack: WeightToPack) -> Tensor:
    """Returns the weight as it is packed, `(out, in)`."""
    return to_pack.weight.mT if to_pack.transposed else to_pack.weight


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

    targets: the empty tensors of the model, by name. kept: packed blocks of a calibration that was stopped.
    errors: of the layers that were packed with feedback. left: those packed by rounding, with the reason.
    """

    opened: OpenedCheckpoint
    loader: TensorLoader
    device: torch.device
    targets: Mapping[str, Tensor]
    kept: KeptBlocks | None = None
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
        shape = _weight(to_pack).shape
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
        """Runs the text through a block in full precision, and notes the inputs of its layers."""
        for text in texts:
            check_signals()
            with noted_inputs(inputs.layers) as noted:
                output = text.recorded.calls[number].run(block, text.plain)
            if text.rounded is None:
                inputs.add(noted, text.batch)
            text.plain = output

    def products(
        self, block: nn.Module, number: int, texts: Sequence[Text], leader: str, inputs: BlockInputs
    ) -> InputProducts | None:
        """Returns the products of the inputs that a group gets behind the packed layers, those of this block too.

        None if it is not called with every token there, unlike in the 16-bit model.
        """
        found: InputProducts | None = None
        for text, plain in zip((text for text in texts if text.rounded is None), inputs.rows, strict=True):
            check_signals()
            call = text.recorded.calls[number]
            value = input_of(inputs.layers[leader], functools.partial(call.run, block, text.packed))
            rows = None if value is None else token_rows(value, text.batch)
            if rows is None:
                return None
            found = found or InputProducts(rows.shape[1], rows.device)
            found.add(rows, plain.pop(leader))
        return found

    def pack_block_(self, block: nn.Module, number: int, texts: Sequence[Text], work: Work) -> None:
        """Packs a block, and runs the text through it."""
        model, found = self.opened.model, self.load_block_(block)
        reasons = {name: self.unsuitable(to_pack) for name, to_pack in found.items()}
        kept = None if self.kept is None else self.kept.read(number)
        suitable = [name for name, reason in reasons.items() if reason is None and kept is None]
        inputs = BlockInputs({name: found[name].first[1] for name in suitable})
        self.run_plain(block, number, texts, inputs)
        done = {name: self._restored(found[name], layer) for name, layer in (kept or {}).items()}
        for names in inputs.groups():
            if (products := self.products(block, number, texts, names[0], inputs)) is None:
                continue
            order = products.order(self.config.blocksize)
            for name in names:
                weight, format = _weight(found[name]), found[name].format
                done[name] = pack_with_feedback(weight, products, order, self.config, format, found[name].name)
                found[name].fill_(model, done[name].packed, self.config)
                self.errors[name] = done[name].errors
                work.reach(work.done + 1, self.figures())
        if kept is None and self.kept is not None:
            self.kept.write(number, {name: (result.packed, result.errors) for name, result in done.items()})
        for name in kept or ():
            found[name].fill_(model, done[name].packed, self.config)
            self.errors[name] = done[name].errors
            work.reach(work.done + 1, self.figures())
        for name, to_pack in found.items():
            if name not in done:
                self.left[name] = reasons[name] or INCOMPLETE
                pack_(model, to_pack, self.config)
                work.advance()
        self.run_packed(block, number, texts)
        self.run_rounded(block, number, texts, {name: result.rounded for name, result in done.items()})

    def _restored(self, to_pack: WeightToPack, layer: KeptLayer) -> FeedbackResult:
        """Returns what packing a weight gave in a calibration that was stopped."""
        weight = _weight(to_pack)
        rounded = PackedWeight.of(weight, self.config, to_pack.format, to_pack.name)
        packed = empty_like(rounded)
        packed.load_state_dict(dict(layer.buffers))
        return FeedbackResult(rounded, packed, layer.errors)

    def run_packed(self, block: nn.Module, number: int, texts: Sequence[Text]) -> None:
        """Runs the text through a block that is packed with feedback."""
        for text in texts:
            check_signals()
            text.packed = text.recorded.calls[number].run(block, text.packed)

    def run_rounded(
        self, block: nn.Module, number: int, texts: Sequence[Text], rounded: Mapping[str, PackedWeight]
    ) -> None:
        """Runs the held-out text through a packed block with other weights in place of its own."""
        layers = {name: cast(QuantizedLinear, self.opened.model.get_submodule(name)) for name in rounded}
        own = {name: layer.weight for name, layer in layers.items()}
        for name, layer in layers.items():
            layer.weight = rounded[name]
        for text in texts:
            if text.rounded is not None:
                check_signals()
                text.rounded = text.recorded.calls[number].run(block, text.rounded)
        for name, layer in layers.items():
            layer.weight = own[name]

    def figures(self) -> str:
        """Returns how much of the error of rounding is left, over all layers so far."""
        return f"error {sum(e.ratio for e in self.errors.values()) / len(self.errors):.0%} of rounding's"
