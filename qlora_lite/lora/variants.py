"""The variants of LoRA. Other files of the package ask a `Variant`, and name none but the default, `lora`.

With A and B, the base weight W0 and the base's bias b, an adapted layer computes

    y = (1 + gain) * (W0 x + scaling * B A x) + b + added_bias

    lora         gain = 0            added_bias = 0            arXiv:2106.09685
    dora         gain = m / n - 1    added_bias = 0            arXiv:2402.09353
    lora_bias    gain = 0            added_bias = scaling * c  for adapters extracted from a model with trained biases

m `(out,)` are trained magnitudes, n `(out,)` the norms of the rows of W0 + scaling * B A, and c `(out,)` a trained bias
of B.

A `Variant` names the parameters that a layer has in addition to A and B and computes gain and added_bias from them. It
says what merging makes of the weight, how peft's files name the parameters and the option, and which layers cannot have
it. The functions at the end count the update of any variant from the values that A and B began with (PiSSA).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from qlora_lite.checks import require
from qlora_lite.compute.weight_update import AdapterDelta, Delta
from qlora_lite.errors import ConfigError, listing
from qlora_lite.lora.kinds import EmbeddingKind, Kind, RouterKind, StackKind

# The buffers of a LoraLayer that hold the initial A and B, and their names in a run's checkpoints.
REFERENCE = ("start_A", "start_B")
# peft has neither dropout nor variants on these.
PLAIN_ONLY = (StackKind, RouterKind)

Values = Mapping[str, Tensor]


class VariantLayer(Protocol):
    """The attributes of a LoraLayer that variants read."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    start_A: Tensor | None
    start_B: Tensor | None
    rank: int
    alpha: float
    use_rslora: bool

    @property
    def lora_parameters(self) -> Values: ...

    @property
    def delta(self) -> AdapterDelta: ...

    def base_rows(self) -> Iterator[tuple[int, Tensor]]: ...


@dataclass(frozen=True)
class ExtraParameter:
    """A trained vector `(out,)` that a variant has in addition to A and B.

    name: of the parameter on a LoraLayer and in a run's checkpoints. title: what messages call it. initial: its values
    for a layer with given A and B. peft_key: the end of its key in peft's files. older_peft_keys: the ends that other
    releases of peft wrote. peft_shape: its shape there, from `out` and the number of dimensions of the base weight.
    """

    name: str
    title: str
    initial: Callable[[VariantLayer], Tensor]
    peft_key: str
    older_peft_keys: tuple[str, ...] = ()
    peft_shape: Callable[[int, int], tuple[int, ...]] = lambda out, dims: (out,)


@dataclass(frozen=True)
class Variant:
    """A variant of LoRA. The module docstring has the equation.

    name: LoraConfig's `variant`. peft_option: the option of peft's configuration that chooses it; None only for a
    variant without parameters of its own. excluded: kinds of layers that cannot have it.
    gain: `(out,)` in fp32, with gradients for the extra parameters. None where it is 0.
    weight_update: the update of the weight, from scaling * B A and the extra parameters. None where that is all of it.
    added_bias: `(out,)`, from the scaling and the extra parameters, with gradients for them. None where it is 0.
    """

    name: str
    peft_option: str | None = None
    parameters: tuple[ExtraParameter, ...] = ()
    excluded: tuple[type, ...] = PLAIN_ONLY
    gain: Callable[[VariantLayer], Tensor] | None = None
    weight_update: Callable[[Delta, Values], Delta] | None = None
    added_bias: Callable[[float, Values], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.parameters and self.peft_option is None:
            titles = " and ".join(parameter.title for parameter in self.parameters)
            raise ConfigError(
                f"variant {self.name!r} has parameters ({titles}) and no peft_option, so its files would be read as "
                f"those of plain LoRA; give it a peft_option"
            )

    def bias_update(self, scaling: float, values: Values) -> Delta | None:
        """Returns the update of the base's bias, taken as a matrix of one column. None where it stays as it is."""
        if self.added_bias is None:
            return None
        added = self.added_bias(scaling, values).detach().float()
        return Delta(added[:, None], torch.ones(1, 1, device=added.device), 1.0)

    def updated(self, low_rank: AdapterDelta, values: Values) -> AdapterDelta:
        """Returns the update of the stored weight, from scaling * B A and the extra parameters by name."""
        if self.weight_update is None:
            return low_rank
        assert isinstance(low_rank, Delta)  # no variant is on a stack
        return self.weight_update(low_rank, values)

    def file_shapes(self, kind: Kind, base: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes that the parameters of a layer have in peft's files, by their names on a LoraLayer."""
        weight = base.weight
        out, dims = kind.features(base)[1], len(weight.shape)  # type: ignore[arg-type]
        extra = {parameter.name: parameter.peft_shape(out, dims) for parameter in self.parameters}
        return kind.file_shapes(base, rank) | extra

    @torch.no_grad()
    def reset_parameters_(self, layer: VariantLayer) -> None:
        """Gives the extra parameters their initial values for the A and B that the layer has. Skips those on meta."""
        for parameter in self.parameters:
            values = layer.lora_parameters[parameter.name]
            if not values.is_meta:
                values.copy_(parameter.initial(layer))


@torch.no_grad()
def output_norms(layer: VariantLayer) -> Tensor:
    """Returns n `(out,)` in fp32: the norms of the rows of W0 + scaling * B A, from slices of W0."""
    with torch.autocast(layer.lora_A.device.type, enabled=False):
        delta = layer.delta
        assert isinstance(delta, Delta)
        return delta.norms_of(layer.base_rows())


def _dora_gain(layer: VariantLayer) -> Tensor:
    """m / n - 1. No gradient flows through n (section 4.3 of the paper)."""
    return layer.lora_parameters["lora_magnitude"].float() / output_norms(layer) - 1


def _dora_update(low_rank: Delta, values: Values) -> Delta:
    return replace(low_rank, output_norms=values["lora_magnitude"].detach().float().flatten())


LORA = Variant("lora", excluded=())
DORA = Variant(
    "dora",
    peft_option="use_dora",
    parameters=(
        ExtraParameter(
            "lora_magnitude",
            "magnitudes",
            initial=output_norms,  # with m = n the layer begins as it would without m
            peft_key="lora_magnitude_vector",
            older_peft_keys=("lora_magnitude_vector.weight",),  # a parameter in peft 0.9, a module since 0.11
            peft_shape=lambda out, dims: (out,) if dims == 2 else (1, out, *(1,) * (dims - 2)),
        ),
    ),
    gain=_dora_gain,
    weight_update=_dora_update,
)

LORA_BIAS = Variant(
    "lora_bias",
    peft_option="lora_bias",
    parameters=(
        ExtraParameter(
            "lora_bias",
            "biases of B",
            initial=lambda layer: torch.zeros_like(layer.lora_parameters["lora_bias"]),
            peft_key="lora_B.bias",
        ),
    ),
    excluded=(*PLAIN_ONLY, EmbeddingKind),  # peft's B of an embedding has no bias
    added_bias=lambda scaling, values: scaling * values["lora_bias"],
)

VARIANTS = {variant.name: variant for variant in (LORA, DORA, LORA_BIAS)}
EXTRA_PARAMETERS = {extra.name: extra for variant in VARIANTS.values() for extra in variant.parameters}
PEFT_OPTIONS = {variant.peft_option: variant for variant in VARIANTS.values() if variant.peft_option is not None}


def check_variant(name: object) -> None:
    """Raises ConfigError unless a variant has this name."""
    require(name in VARIANTS, f"variant must be one of {', '.join(VARIANTS)}", name)


def check_bias(variant: Variant, bias: object) -> None:
    """Raises ConfigError if the base's bias is to be trained, by LoraConfig's `bias`, and the variant adds to it."""
    allowed = variant.added_bias is None or bias == "none"
    require(allowed, f"bias must be none with variant {variant.name}, which trains one of its own", bias)


def combination_problems(layers: Mapping[str, Kind | None], dropout: float, variant: Variant) -> list[str]:
    """Returns a sentence for each option that adapters on layers of these kinds cannot have."""
    problems = []
    without_dropout = {name: kind for name, kind in layers.items() if isinstance(kind, PLAIN_ONLY)}
    if dropout > 0 and without_dropout:
        problems.append(
            f"dropout must be 0 on {_titles(without_dropout)}; got {dropout} for {listing(list(without_dropout), 4)}; "
            f"set dropout=0, or leave these out"
        )
    excluded = {name: kind for name, kind in layers.items() if isinstance(kind, variant.excluded)}
    if excluded:
        problems.append(
            f"variant must be lora on {_titles(excluded)}; got {variant.name!r} for {listing(list(excluded), 4)}; "
            f"set variant='lora', or leave these out"
        )
    return problems


def variant_contradictions(parts: Collection[str], variant: Variant) -> list[str]:
    """Returns how the names of a layer's parameters contradict the variant, each as the end of a sentence."""
    wanted = {extra.name for extra in variant.parameters}
    return [
        f"has {'' if extra.name in parts else 'no '}{extra.title} and {option} says otherwise"
        for option, other in PEFT_OPTIONS.items()
        for extra in other.parameters
        if (extra.name in parts) != (extra.name in wanted)
    ]


def _titles(kinds: Mapping[str, Kind | None]) -> str:
    return " and ".join(sorted({kind.title for kind in kinds.values() if kind is not None}))


def variant_of(peft_config: Mapping[str, object]) -> Variant:
    """Returns the variant that peft's configuration chooses. Raises ConfigError if it chooses several."""
    chosen = [option for option in PEFT_OPTIONS if peft_config.get(option)]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)} are set, and an adapter has one variant")
    return PEFT_OPTIONS[chosen[0]] if chosen else LORA


def peft_options(variant: Variant) -> dict[str, bool]:
    """Returns the options that choose a variant in peft's configuration.

    Every file has had `use_dora`, set or not. Releases of peft that do not know an option refuse a file that has it,
    so the other options are written only where they are set.
    """
    chosen = {} if variant.peft_option is None else {variant.peft_option: True}
    return {"use_dora": False} | chosen


def factors_from_reference(layer: VariantLayer) -> tuple[Tensor, Tensor]:
    """Returns A and B of the update B A - B_0 A_0, of rank 2 r, for a layer with a reference A_0, B_0.

    B A - B_0 A_0 = (B - B_0) A + B_0 (A - A_0): the differences are formed before anything is rounded, and begin as 0.
    """
    assert layer.start_A is not None and layer.start_B is not None
    lora_A = torch.cat((layer.lora_A, layer.lora_A - layer.start_A))
    return lora_A, torch.cat((layer.lora_B - layer.start_B, layer.start_B), dim=1)


def ordinary_rank(layer: VariantLayer) -> int:
    """Returns the rank of `LoraLayer.factors`, and of the ordinary adapter that they are saved as."""
    return layer.rank if layer.start_A is None else 2 * layer.rank


def ordinary_alpha(layer: VariantLayer) -> float:
    """Returns the alpha with which an adapter of `ordinary_rank` has the scaling of the layer."""
    return layer.alpha if layer.start_A is None else layer.alpha * (math.sqrt(2) if layer.use_rslora else 2)


def set_reference_(layer: VariantLayer) -> None:
    """Counts the update from the A and B that the layer has now. The layer then computes what its base computes."""
    layer.start_A, layer.start_B = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()


def clear_reference_(layer: VariantLayer) -> None:
    """Makes B A the whole update again."""
    layer.start_A = layer.start_B = None


def reference_tensors(layer: VariantLayer) -> dict[str, Tensor]:
    """Returns the reference of a layer by the names of its buffers. Empty without one."""
    found = {name: getattr(layer, name) for name in REFERENCE}
    return {name: value for name, value in found.items() if value is not None}
