"""Selects the layers to pack, and those that stay unpacked by themselves, with the reason.

Some layers cannot be packed: their weight is read instead of the layer being called, their forward is not that of a
linear layer, or they are stacks of matrices in a module of an unknown type. transformers keeps others in float32 on
purpose. All of these stay as they are, whether `skip_modules` names them or not. So do the vision tower of a
vision-language model and its projector, unless `skip_modules` is given and does not name their layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import nn

from qlora_lite.architecture import kept_in_float32, output_head
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.experts import PackedStack, packable_stacks, stacks
from qlora_lite.quantization.formats import UNPACKED
from qlora_lite.quantization.from_bitsandbytes import is_bitsandbytes
from qlora_lite.surgery import (
    NOT_LANGUAGE_MODEL,
    check_all_matched,
    distinct_ends,
    has_own_forward,
    is_below,
    is_transposed_linear,
    matches_as_in_transformers,
    name_matches,
    tower_names,
)
from qlora_lite.tasks import in_label_head
from qlora_lite.weight_readers import weights_read

# Whether a module of this name is not to be packed.
SkipRule = Callable[[str, nn.Module], bool]


def is_plain_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer, torch's or GPT-2's, that its parent calls."""
    # nn.MultiheadAttention reads the weight of its out_proj itself and never calls it.
    plain = isinstance(module, nn.Linear) and type(module).__name__ != "NonDynamicallyQuantizableLinear"
    return plain or is_transposed_linear(module)


def skip_rule(model: nn.Module, config: QuantConfig) -> SkipRule:
    """Returns the rule of `skip_modules`; a head of labels, which is trained whole, is skipped whatever they name.

    Raises TargetError with the names that match nothing.
    """
    labels = in_label_head(model, (name for name, _ in model.named_modules()))
    if config.skip_modules is not None:
        linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) or is_plain_linear(m)]
        held = stacks(model)
        owners = [name.rpartition(".")[0] for name in held]
        check_all_matched("skip_modules", config.skip_modules, [*linears, *held, *owners])
        skips = config.skip_modules
        return lambda name, module: name in labels or any(name_matches(name, skip) for skip in skips)
    head = output_head(model)
    return lambda name, module: name in labels or module is head


def unpackable_stacks(model: nn.Module, config: QuantConfig) -> dict[str, str]:
    """Returns the stacks of matrices in modules of an unknown type that are not skipped, each with its description."""
    skip, found = skip_rule(model, config), dict[str, str]()
    for path, weight in stacks(model).items():
        name, _, key = path.rpartition(".")
        module = model.get_submodule(name)
        skipped = isinstance(weight, PackedStack) or skip(path, module) or skip(name, module)
        if not skipped and key not in packable_stacks(module):
            found[path] = f"{tuple(weight.shape)} of a {type(module).__name__}"
    return found


def skips_for(model: nn.Module, config: QuantConfig) -> list[str]:
    """Returns the `skip_modules` that add the stacks which cannot be packed to what `config` skips, the head included.

    Each entry is the end of a module's name, as short as it can be without matching anything else that is packed.
    """
    head, skip = output_head(model), skip_rule(model, config)
    known = [name for name, m in model.named_modules() if m is head and isinstance(m, nn.Linear)]
    if config.skip_modules is not None:
        known = list(config.skip_modules)
    owners = {name.rpartition(".")[0] for name in unpackable_stacks(model, config)}
    others = [name for name, module in model.named_modules() if is_plain_linear(module) and not skip(name, module)]
    others += [owner for name in stacks(model) if (owner := name.rpartition(".")[0]) not in owners]
    return [*distinct_ends(owners, others), *known]


def _linears_left_unpacked(model: nn.Module, config: QuantConfig, packed: Collection[str]) -> dict[str, str]:
    read, kept, found = weights_read(model), kept_in_float32(model), dict[str, str]()
    # Their errors reach every token of an image, no adapter of the language model sees them, and they are small.
    towers = tower_names(model) if config.skip_modules is None else []
    packed_weights = {model.get_submodule(name).weight for name in packed}
    for name, module in model.named_modules():
        if not is_plain_linear(module) or is_bitsandbytes(module):
            continue
        if has_own_forward(module):
            found[name] = f"a {type(module).__name__} has a forward of its own"
        elif name in read:
            found[name] = f"{read[name]} reads its weight"
        elif matches_as_in_transformers(name, kept) and module.weight not in packed_weights:
            found[name] = "transformers keeps it in float32"
        elif is_below(name, towers) and module.weight not in packed_weights:
            found[name] = NOT_LANGUAGE_MODEL
    return found


def left_unpacked(model: nn.Module, config: QuantConfig, packed: Collection[str] = ()) -> dict[str, str]:
    """Returns the layers and stacks that packing leaves as they are although nothing asked for it, with the reasons.

    The model may be on the meta device, and must not be packed yet. packed: names of layers that are packed already,
    in the files of a checkpoint. Raises TargetError for `skip_modules` that match nothing.
    """
    if config.format == UNPACKED:
        return {}
    skip = skip_rule(model, config)
    found = {
        name: reason
        for name, reason in _linears_left_unpacked(model, config, packed).items()
        if not skip(name, model.get_submodule(name))
    }
    stacked = unpackable_stacks(model, config)
    return found | {name: f"a stack of matrices {described}" for name, described in stacked.items()}
