"""`quantize_base_`: packs the linear layers, experts, and if asked embedding and head of a model, in place.

Reading order: which layers are packed -> `WeightToPack` -> `weights_to_pack` -> `quantize_base_`. Loading a checkpoint
asks `weights_to_pack` too, for a model on the meta device.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from qlora_lite.architecture import input_embedding, output_head
from qlora_lite.errors import ConfigError, TargetError, listing
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.experts import PackedStack, RoutedExperts, stacks
from qlora_lite.quantization.formats import UNPACKED, either, embedding_formats
from qlora_lite.quantization.from_bitsandbytes import converted, is_bitsandbytes, remove_bitsandbytes_marks_
from qlora_lite.quantization.layers import QuantizedEmbedding, QuantizedLinear
from qlora_lite.quantization.packed_weight import PackedWeight, check_packable
from qlora_lite.quantization.selection import is_plain_linear, left_unpacked, skip_rule, skips_for, unpackable_stacks
from qlora_lite.surgery import (
    exchange_modules_,
    has_own_forward,
    is_transposed_linear,
    replace_modules_,
)


def _embedding_and_head(model: nn.Module, config: QuantConfig) -> tuple[nn.Embedding, nn.Linear | None]:
    """Returns the input embedding, and the output head if it is linear. Raises ConfigError if they cannot be packed."""
    embedding, head = input_embedding(model), output_head(model)
    if not isinstance(embedding, nn.Embedding) or has_own_forward(embedding):
        got = "no get_input_embeddings()" if embedding is None else f"a {type(embedding).__name__}"
        raise ConfigError(f"embedding_format={config.embedding_format!r} needs a plain nn.Embedding; got {got}")
    if embedding.max_norm is not None:
        raise ConfigError(
            "an embedding with max_norm rewrites its weight and cannot be packed; set embedding_format='none'"
        )
    plain_head = isinstance(head, nn.Linear) and not has_own_forward(head)
    return embedding, cast(nn.Linear, head) if plain_head else None


def _check_structure(model: nn.Module, targets: dict[str, nn.Module]) -> None:
    """Raises ConfigError or TargetError for layers that cannot be packed whatever their values are."""
    merged = [name for name, module in model.named_modules() if getattr(module, "merged", False)]
    if merged:
        raise ConfigError(f"{len(merged)} layers are merged with the base that would be replaced; unmerge_lora_ first")
    embedding = getattr(input_embedding(model), "weight", None)
    for name, module in targets.items():
        if embedding is not None and module.weight is embedding:
            formats = either(*map(repr, embedding_formats()))
            raise TargetError(
                f"{name} shares its weight with the input embedding and packing it alone would untie them; "
                f"leave it out (skip_modules) or pack both (embedding_format={formats})"
            )


def _linear_targets(
    model: nn.Module, config: QuantConfig, ends: Sequence[nn.Module], packed: Collection[str]
) -> dict[str, nn.Module]:
    """Returns the linear layers to pack or convert, by name, without `ends`: embedding and head, if packed apart."""
    skip, left = skip_rule(model, config), left_unpacked(model, config, packed)

    def is_target(name: str, module: nn.Module) -> bool:
        wanted = config.format != UNPACKED or is_bitsandbytes(module)
        skipped = name in left or any(module is end for end in ends) or skip(name, module)
        return is_plain_linear(module) and wanted and not skipped

    return {name: module for name, module in model.named_modules() if is_target(name, module)}


@dataclass(frozen=True)
class WeightToPack:
    """A weight to pack, and the modules that hold it, by name; several if it is tied.

    stack: for a stack of matrices in an experts module, the name of the parameter; each matrix is packed separately.
    """

    weight: Tensor
    format: str
    modules: dict[str, nn.Module]
    stack: str | None = None

    @property
    def name(self) -> str:
        return f"{self.first[0]}.{self.stack or 'weight'}"

    @property
    def first(self) -> tuple[str, nn.Module]:
        return next(iter(self.modules.items()))

    @property
    def transposed(self) -> bool:
        """Whether the weight is `(in, out)`, and is transposed before it is packed."""
        module = self.first[1]
        return is_transposed_linear(module) or (self.stack is not None and bool(module.is_transposed))

    def fill_stack_(self, model: nn.Module, matrices: Iterable[PackedWeight], config: QuantConfig) -> None:
        """Replaces the stack by packed matrices, and the module that holds it by a `RoutedExperts`."""
        packed = PackedStack(matrices, self.transposed)
        assert self.stack is not None
        for name, module in self.modules.items():
            now = model.get_submodule(name)
            if not isinstance(now, RoutedExperts):
                now = RoutedExperts(module, config.compute_dtype)
                exchange_modules_(model, {id(module): now})
            now.hold_(self.stack, packed)

    def fill_(self, model: nn.Module, packed: PackedWeight, config: QuantConfig) -> None:
        """Replaces the modules by packed layers."""
        made = {id(module): _packed_module(module, packed, config) for module in self.modules.values()}
        exchange_modules_(model, made)


def _packed_module(module: nn.Module, packed: PackedWeight, config: QuantConfig) -> nn.Module:
    if isinstance(module, nn.Embedding):
        made: nn.Module = QuantizedEmbedding(packed, module.weight.dtype, module.padding_idx)
    else:
        turned = is_transposed_linear(module)
        made = QuantizedLinear(packed, cast(nn.Linear, module).bias, config.compute_dtype, turned)
    return made.train(module.training)


def _stacks_to_pack(model: nn.Module, config: QuantConfig) -> dict[Tensor, WeightToPack]:
    """Returns the stacks of experts to pack."""
    if config.format == UNPACKED:
        return {}
    skip, left = skip_rule(model, config), unpackable_stacks(model, config)
    found: dict[Tensor, WeightToPack] = {}
    for path, weight in stacks(model).items():
        name, _, key = path.rpartition(".")
        module = model.get_submodule(name)
        if isinstance(weight, PackedStack) or path in left or skip(path, module) or skip(name, module):
            continue
        found.setdefault(weight, WeightToPack(weight, config.format, {}, key)).modules[name] = module
    return found


def _check_share(model: nn.Module, config: QuantConfig, found: Iterable[WeightToPack]) -> None:
    """Raises TargetError if more values are in stacks that cannot be packed than in the weights that are packed."""
    if config.format == UNPACKED:
        return
    held, left = stacks(model), unpackable_stacks(model, config)
    unpacked, packed = sum(held[path].shape.numel() for path in left), sum(part.weight.numel() for part in found)
    if unpacked > packed:
        shown = listing((f"{path} {described}" for path, described in left.items()), 4)
        skips = skips_for(model, config)
        raise TargetError(
            f"{len(left)} stacks of matrices cannot be packed: {shown}; they hold {unpacked / (unpacked + packed):.0%} "
            f"of the values to pack; if they may stay unpacked, set skip_modules={skips} (--skip-modules "
            f"{','.join(skips)})"
        )


def weights_to_pack(model: nn.Module, config: QuantConfig, packed: Collection[str] = ()) -> list[WeightToPack]:
    """Returns the weights of a model to pack. The model may be on the meta device: values are not read.

    packed: names of layers that are packed already, in the files of a checkpoint. Raises ConfigError and TargetError as
    `quantize_base_` does.
    """
    ends: list[nn.Module] = []
    if config.embedding_format != UNPACKED:
        ends = [module for module in _embedding_and_head(model, config) if module is not None]
    targets = _linear_targets(model, config, ends, packed)
    if not targets and config.format != UNPACKED:
        left = [f"{name} ({reason})" for name, reason in left_unpacked(model, config, packed).items()]
        raise TargetError(
            "no layer to pack: the model has no nn.Linear outside of skip_modules and the output head"
            + f" but {listing(left, 4)}" * bool(left)
        )
    _check_structure(model, targets)
    found: dict[Tensor, WeightToPack] = _stacks_to_pack(model, config)
    for name, module in model.named_modules():
        is_end = any(module is end for end in ends)
        if is_end or name in targets:
            weight = cast(Tensor, module.weight)
            to_pack = found.setdefault(
                weight, WeightToPack(weight, config.embedding_format if is_end else config.format, {})
            )
            to_pack.modules[name] = module
    _check_share(model, config, found.values())
    return list(found.values())


def _check_values(found: list[WeightToPack], config: QuantConfig) -> None:
    """Raises QuantizationError for values that cannot be packed, before the first layer is replaced."""
    for to_pack in found:
        name, module = to_pack.first
        if is_bitsandbytes(module):
            converted(cast(nn.Linear, module), name, config)
        elif to_pack.stack is not None:
            for expert, matrix in enumerate(to_pack.weight):
                check_packable(matrix, f"{to_pack.name}[{expert}]", to_pack.format)
        else:
            check_packable(to_pack.weight, to_pack.name, to_pack.format)


def quantize_base_(model: nn.Module, config: QuantConfig) -> list[str]:
    """Replaces the linear layers of a model by packed ones, one at a time. Returns the names of the replaced modules.

    Stacks of experts are packed matrix by matrix; `config.embedding_format` packs embedding and head. Layers that
    cannot be packed stay as they are; `selection.left_unpacked` lists them. Each full-precision weight is released
    before the next one is packed. Layers that bitsandbytes packed keep their format, whatever `config.format` says, and
    share their bytes.

    Raises QuantizationError for NaN or infinity, with the weight and the first bad index; TargetError if there is
    nothing to pack, if a tied head would be packed without its embedding, or if most values are in stacks of matrices
    that cannot be packed; ConfigError for merged layers and unsupported embeddings. The model is then unchanged.
    """
    found = weights_to_pack(model, config)
    replaced = list(dict.fromkeys(name for to_pack in found for name in to_pack.modules))
    _check_values(found, config)
    while found:
        pack_(model, found.pop(0), config)  # popped, so that its weight is released before the next one is packed
    remove_bitsandbytes_marks_(model)
    return replaced


def pack_(model: nn.Module, to_pack: WeightToPack, config: QuantConfig) -> None:
    """Replaces the modules of a plain weight in memory by packed ones. Its values must be finite."""
    name, module = to_pack.first
    if is_bitsandbytes(module):
        made = converted(cast(nn.Linear, module), name, config)
        replace_modules_(model, lambda other, old: made if old is module else None)
        return
    weight = to_pack.weight.mT if to_pack.transposed else to_pack.weight
    if to_pack.stack is not None:
        to_pack.fill_stack_(model, [PackedWeight.of(matrix, config, to_pack.format) for matrix in weight], config)
    else:
        to_pack.fill_(model, PackedWeight.of(weight, config, to_pack.format), config)
