"""Names, recognizes and replaces modules inside a model, for packing a base and adding adapters.

A tower is a part of a multimodal model beside its language model: a vision tower, its projector, an audio encoder. Text
reaches none of them, and they can be left out of a model before it is filled from a checkpoint.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from qlora_lite import architecture
from qlora_lite.errors import ConfigError, TargetError, listing

NOT_LANGUAGE_MODEL = "not part of the language model"


def name_matches(name: str, wanted: str) -> bool:
    """Whether a module's dotted name is `wanted` or ends with `.wanted`, as peft matches target_modules."""
    return name == wanted or name.endswith("." + wanted)


def is_part_of_path(name: str, part: str) -> bool:
    """Whether a module's dotted name is `part` or has it between dots, as `a.tower.0.q` has `tower`, `tower.0`, `q`."""
    return f".{part}." in f".{name}."


def distinct_ends(names: Iterable[str], others: Collection[str]) -> list[str]:
    """Returns the shortest ends of these dotted names that, as `wanted` of `name_matches`, match none of `others`."""
    found = set()
    for name in names:
        parts = name.split(".")
        ends = (".".join(parts[first:]) for first in range(len(parts) - 1, -1, -1))
        found.add(next((end for end in ends if not any(name_matches(other, end) for other in others)), name))
    return sorted(found)


# A file may have a pattern for each of several hundred layers, more than `re` caches.
@functools.lru_cache(maxsize=1 << 14)
def layer_pattern(pattern: str) -> re.Pattern[str]:
    """Compiles a pattern of rank_pattern or alpha_pattern as peft does: it matches a name, or its end after a dot."""
    return re.compile(rf"(.*\.)?({pattern})$")


def matching_pattern(patterns: Collection[str], name: str) -> str | None:
    """Returns the pattern that applies to a layer: the first that matches, else one equal to its name, else None."""
    matching = (pattern for pattern in patterns if layer_pattern(pattern).match(name))
    return next(matching, name if name in patterns else None)


def matches_as_in_transformers(name: str, patterns: Iterable[str]) -> bool:
    """Whether transformers takes a module for one that is not to be packed.

    Its name begins with one of the patterns, up to a dot, or ends with it.
    """
    keys = [pattern.removesuffix(".weight") for pattern in patterns]
    return any(re.match(rf"(?:{key})(?:\.|$)", name) or name.endswith(key) for key in keys)


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """At the end of the block every module is in training or evaluation mode as before."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def has_own_forward(module: nn.Module) -> bool:
    """Whether a linear layer, embedding or convolution has another forward than torch's class, as scaled embeddings do.

    A packed or adapted layer in its place would not compute the same. Falcon's linear layer would: it only adds the
    bias in an operation of its own.
    """
    if _qualified_name(module) == "transformers.models.falcon.modeling_falcon.FalconLinear":
        return False
    plain = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return any(isinstance(module, kind) and type(module).forward is not kind.forward for kind in plain)


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether this is the linear layer of GPT-2, transformers' Conv1D: y = x W + b with W `(in, out)`."""
    return _qualified_name(module) == "transformers.pytorch_utils.Conv1D"


def _qualified_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def is_router(module: nn.Module) -> bool:
    """Whether this is a transformers router that scores tokens with a matrix `(experts, in)` of its own.

    A router that is a linear layer does not count: with torch's forward it is adapted as a linear layer, with another
    forward not at all.
    """
    weight = module._parameters.get("weight")
    if not type(module).__name__.endswith("Router") or isinstance(module, (nn.Linear, nn.Embedding)):
        return False
    if weight is None or weight.dim() != 2:
        return False
    takes = list(inspect.signature(type(module).forward).parameters)
    return weight.is_floating_point() and len(takes) == 2  # itself and the tokens


def described_by_pattern(found: Mapping[str, str], parts: Iterable[str] = ()) -> list[str]:
    """Returns a line for each reason and each name without its numbers: `2 x layers.*.mixer.dt_proj: reason`.

    parts: names of modules of which all layers are described in one line, `14 x vision_tower: reason`.
    """
    counts: dict[tuple[str, str], int] = {}
    for name, reason in found.items():
        part = next((part for part in parts if is_below(name, (part,))), None)
        key = part or re.sub(r"(?<=\.)\d+(?=\.)", "*", name), reason
        counts[key] = counts.get(key, 0) + 1
    return [f"{count} x {pattern}: {reason}" for (pattern, reason), count in counts.items()]


def check_all_matched(setting: str, wanted: Iterable[str], names: Iterable[str]) -> None:
    """Raises TargetError with all wanted names that match no module, and the last parts of the names that exist."""
    names = list(names)
    lost = [name for name in wanted if not any(name_matches(candidate, name) for candidate in names)]
    if lost:
        has = ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "none"
        raise TargetError(f"{setting} {lost} matched no layer; this model has: {has}")


def _below_any(name: str, above: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:depth]) in above for depth in range(1, len(parts)))


def replace_modules_(model: nn.Module, make: Callable[[str, nn.Module], nn.Module | None]) -> list[str]:
    """Replaces every module for which `make(name, module)` is not None. Returns their names in order.

    Changes the model. `make` is called once for a module that is registered under several names, and the result is put
    under all of them. Modules below a replaced one are not visited. A replaced module is released before the next one
    is made.
    """
    names_of: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names_of.setdefault(id(module), []).append(name)
    replaced: set[str] = set()
    order: list[str] = []
    for names in names_of.values():
        standing = [name for name in names if not _below_any(name, replaced)]
        if not standing:
            continue
        old = model.get_submodule(standing[0])
        new = make(standing[0], old)
        if new is None:
            continue
        if not standing[0]:
            raise TargetError(f"the model itself is the {type(old).__name__} to replace; put it into a container")
        for name in standing:
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, new)
        replaced.update(standing)
        order.append(standing[0])
        del old
    return order


def exchange_modules_(model: nn.Module, new: dict[int, nn.Module]) -> None:
    """Replaces each module by `new[id(module)]` wherever it is registered, in one pass over the model."""
    if id(model) in new:
        raise TargetError(f"the model itself is the {type(model).__name__} to replace; put it into a container")
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if id(child) in new:
                parent._modules[key] = new[id(child)]


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the repeated blocks of a model: the children of its outermost ModuleLists."""
    blocks: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                blocks.extend(child)
            else:
                visit(child)

    visit(model)
    return blocks


class NotLoaded(nn.Module):
    """Stands where a tower was left out. Raises ConfigError when it is called.

    name: of the tower in the model. parts: the names of the modules in the tower, within it.
    """

    def __init__(self, name: str, tower: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.parts = [part for part, _ in tower.named_modules() if part]

    def forward(self, *args: object, **options: object) -> None:
        """Raises ConfigError."""
        raise ConfigError(f"{self.name} was not loaded (text_only), so the model takes text alone; load it whole")


def tower_names(model: nn.Module) -> list[str]:
    """Returns the names of the modules beside the language model, the outermost ones; none for a model of text alone.

    The language model is what transformers calls the decoder of a model whose config has a part for text.
    """
    config: object = getattr(model, "config", None)
    text, decoder = architecture.text_config(config), getattr(model, "get_decoder", None)
    if text is config or not callable(decoder) or any(getattr(c, "is_encoder_decoder", False) for c in (config, text)):
        return []
    names = {module: name for name, module in model.named_modules()}
    top, path = names.get(architecture.base_model(model)), names.get(decoder())
    if top is None or path is None or path == top or not f"{path}.".startswith(f"{top}." if top else ""):
        return []
    ends = (architecture.input_embedding(model), architecture.output_head(model))
    steps, found = path.split("."), list[str]()
    for depth in range(top.count(".") + 1 if top else 0, len(steps)):
        parent = ".".join(steps[:depth])
        beside = [(key, child) for key, child in model.get_submodule(parent).named_children() if key != steps[depth]]
        found += [f"{parent}.{key}".lstrip(".") for key, child in beside if not any(child is end for end in ends)]
    return found


def is_below(name: str, modules: Iterable[str]) -> bool:
    """Whether a module's or tensor's name is that of one of these modules, or of a part of one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def left_out_towers(model: nn.Module) -> list[str]:
    """Returns the names of the towers that were left out of a model."""
    return [name for name, module in model.named_modules() if isinstance(module, NotLoaded)]


def names_not_loaded(model: nn.Module) -> set[str]:
    """Returns the names of all modules in towers that were left out, as the whole model has them."""
    left = {name: module for name, module in model.named_modules() if isinstance(module, NotLoaded)}
    return {f"{name}.{part}" for name, module in left.items() for part in module.parts}


def leave_out_towers_(model: nn.Module) -> list[str]:
    """Replaces the towers of a model by `NotLoaded`; returns their names. Raises ConfigError if it has none."""
    towers = tower_names(model)
    if not towers:
        raise ConfigError(
            f"text_only leaves out a vision tower or the like, and a {type(model).__name__} has none; leave it away"
        )
    for name in towers:
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, NotLoaded(name, model.get_submodule(name)))
    return towers


def check_towers_loaded(model: nn.Module, what: str) -> None:
    """Raises ConfigError if towers were left out of a model. what: cannot be done without them."""
    if towers := left_out_towers(model):
        raise ConfigError(f"{what} needs {listing(towers, 4)}, which was not loaded (text_only); load the model whole")
