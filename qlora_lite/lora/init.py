"""Initialization of A and B, by name: `LoraConfig.init_lora_weights`.

With A or B zero, or with orthogonal rows and columns, B A = 0 and the layer starts as its base. PiSSA and LoftQ start
with principal parts of weights:

    pissa    scaling B A = the principal part of rank r of W0; the update is scaling (B A - B_0 A_0), which starts as 0
    loftq    scaling B A = the principal part of rank r of W - W0, with W the checkpoint's weight and W0 its packed form

PiSSA (arXiv:2404.02948) subtracts B_0 A_0 from the base. Here the layer keeps B_0 A_0 and subtracts it from the update.
Outputs and gradients are the same, the layer starts exactly as its packed base, and it is saved as an ordinary adapter
of rank 2 r.

LoftQ (arXiv:2310.08659, algorithm 1) alternates Q = q(W - scaling B A) and scaling B A = the principal part of W - Q,
starting with B A = 0. `loftq` is the first iteration, with the base as Q. Its adapter belongs to the base packed in the
same format and blocksize, and to no other. `loftq:5` takes five iterations, and replaces the base by the last Q
(checkpoints/base_identity.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.checkpoints import hub
from qlora_lite.checkpoints.checkpoint import full_precision_tensors, tensors_for_model
from qlora_lite.checkpoints.lazy_tensors import LazyTensor
from qlora_lite.checkpoints.safetensors_read import TensorFiles
from qlora_lite.checks import check_finite
from qlora_lite.compute.products.frozen_weight import Weight, dequantized, weight_of
from qlora_lite.errors import CheckpointError, ConfigError, TargetError, listing
from qlora_lite.lora.config import parse_init
from qlora_lite.lora.kinds import EmbeddingKind, LinearKind, StackKind
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.lora.targets import TargetedLayer
from qlora_lite.lora.variants import set_reference_
from qlora_lite.offload.mapped_file import is_mapped, release
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.packed_weight import PackedWeight
from qlora_lite.signals import check_signals

# Singular vectors are computed exactly if the smaller side has at most this size. Otherwise subspace iteration (Halko,
# arXiv:0909.4061) takes seconds instead of minutes. The authors of PiSSA use at most 16 rounds.
EXACT_SIDE = 1024
OVERSAMPLING = 8
ROUNDS = 16

CheckpointWeights = Mapping[str, LazyTensor]


def principal_pair(matrix: Tensor, rank: int, exact_side: int = EXACT_SIDE) -> tuple[Tensor, Tensor]:
    """Returns A = sqrt(S) V^T `(rank, in)` and B = U sqrt(S) `(out, rank)`: B A is the nearest matrix of this rank."""
    side = min(matrix.shape)
    if side <= exact_side:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        left, values, columns = torch.svd_lowrank(matrix, min(rank + OVERSAMPLING, side), ROUNDS)
        right = columns.T
    root = values[:rank].sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def _normal(layer: LoraLayer, name: str, originals: CheckpointWeights) -> None:
    """Does nothing: a new LoraLayer has A from N(0, 0.02) and B zero."""


def _with_zero_B(fill: Callable[[LoraLayer], object]) -> Callable[[LoraLayer, str, CheckpointWeights], None]:
    """Returns an initializer that fills A and zeroes B. An embedding gets A zero and B from N(0, 1), as in peft."""

    def initialize(layer: LoraLayer, name: str, originals: CheckpointWeights) -> None:
        if isinstance(layer.kind, EmbeddingKind):
            nn.init.zeros_(layer.lora_A)
            nn.init.normal_(layer.lora_B)
        else:
            fill(layer)
            nn.init.zeros_(layer.lora_B)

    return initialize


@torch.no_grad()
def _kaiming(layer: LoraLayer) -> None:
    """Fills A, or each matrix of it, uniformly in +-1 / sqrt(in)."""
    for matrix in layer.lora_A if isinstance(layer.kind, StackKind) else (layer.lora_A,):
        nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))


@torch.no_grad()
def _orthogonal(layer: LoraLayer, name: str, originals: CheckpointWeights) -> None:
    """Sets A = Q_even^T N / 10 and B = M Q_odd / 10, with the even and odd rows of an orthogonal matrix: B A = 0.

    N `(rank / 2, in)` and M `(out, rank / 2)` are from N(0, 1), as in peft's `orthogonal`.
    """
    rank = layer.rank
    rows, _ = torch.linalg.qr(torch.randn(rank, rank))
    layer.lora_A.copy_((torch.randn(layer.in_features, rank // 2) @ rows[0::2]).T / 10)
    layer.lora_B.copy_(torch.randn(rank // 2, layer.out_features).T @ rows[1::2] / 10)


def _base_weight(layer: LoraLayer) -> Tensor:
    """Returns W0 `(out, in)` in fp32."""
    return layer.kind.as_matrix(dequantized(layer.weight, torch.float32).detach())


def _set_principal_part_(layer: LoraLayer, name: str, matrix: Tensor) -> None:
    """Sets A and B so that scaling B A is the principal part of this matrix."""
    check_finite(matrix, name, 0)
    lora_A, lora_B = principal_pair(matrix, layer.rank)
    share = abs(layer.scaling) ** -0.5
    layer.lora_A.copy_(lora_A * share)
    layer.lora_B.copy_(lora_B * math.copysign(share, layer.scaling))


def _original_weight(layer: LoraLayer, name: str, originals: CheckpointWeights) -> Tensor:
    """Returns W `(out, in)` in fp32, from the checkpoint."""
    stored = originals[f"{name}.weight"]
    weight = stored.rows(0, stored.shape[0]).to(layer.lora_A.device, torch.float32)
    return weight.T if layer.stored_transposed else weight


@torch.no_grad()
def _pissa(layer: LoraLayer, name: str, originals: CheckpointWeights) -> None:
    """Sets A = sqrt(S / scaling) V^T and B = U sqrt(S / scaling), S the r largest singular values of W0 (eqs. 2, 3)."""
    _set_principal_part_(layer, f"{name}.weight", _base_weight(layer))
    set_reference_(layer)


@torch.no_grad()
def _loftq(layer: LoraLayer, name: str, originals: CheckpointWeights) -> None:
    """Does the same for W - W0, the error of packing (algorithm 1, an iteration without its packing step)."""
    _set_principal_part_(layer, f"{name}.weight", _original_weight(layer, name, originals) - _base_weight(layer))


@torch.no_grad()
def _repack_base_(layer: LoraLayer, name: str, originals: CheckpointWeights) -> None:
    """Replaces the base by W - scaling B A, packed like the old one (algorithm 1, the packing step)."""
    rest = _original_weight(layer, name, originals).addmm(layer.lora_B, layer.lora_A, alpha=-layer.scaling)
    layer.base_layer.weight = repacked(layer.base_layer.weight, rest, f"{name}.weight")  # type: ignore[arg-type]


INITIALIZERS: dict[str, Callable[[LoraLayer, str, CheckpointWeights], None]] = {
    "normal": _normal,
    # peft's default.
    "kaiming": _with_zero_B(_kaiming),
    # A of standard deviation 1 / rank.
    "gaussian": _with_zero_B(lambda layer: nn.init.normal_(layer.lora_A, std=1 / layer.rank)),
    "orthogonal": _orthogonal,
    "pissa": _pissa,
    "loftq": _loftq,
}
# Initializations that exist for linear layers only, and those that are computed from weights.
LINEAR_ONLY = ("orthogonal", "pissa", "loftq")
FROM_WEIGHTS = ("pissa", "loftq")


def check_initialization(model: nn.Module, layers: Iterable[TargetedLayer], init_lora_weights: str) -> None:
    """Raises ConfigError or TargetError, listing all layers that `init_lora_weights` cannot initialize."""
    problems: list[str] = []
    init, rounds = parse_init(init_lora_weights)
    for layer in layers:
        name, kind, rank = layer.name, layer.kind, layer.rank
        weight = weight_of(layer.module)
        if not isinstance(kind, LinearKind) and init in LINEAR_ONLY:
            raise TargetError(
                f"init_lora_weights {init_lora_weights!r} is for linear layers; {name} is {kind.title}: leave it out"
            )
        if init == "orthogonal" and rank % 2:
            problems.append(f"{name} has the odd rank {rank}")
        if init in FROM_WEIGHTS and rank > min(weight.shape):
            problems.append(f"{name} of shape {tuple(weight.shape)} has no {rank} singular values")
        if init in FROM_WEIGHTS and layer.alpha == 0:
            problems.append(f"{name} has alpha 0")
        if init == "loftq" and isinstance(weight, Tensor):
            problems.append(f"{name} is not packed and has no error to make up for")
        elif rounds > 1 and isinstance(weight, PackedWeight) and is_mapped(weight.packed):
            problems.append(f"{name} lies on disk, and would be packed anew into memory; load with base='memory'")
        elif rounds > 1 and count_holders(model, weight) > 1:
            problems.append(f"{name} shares its packed weight with another module, which would be changed with it")
    if problems:
        shown = listing(problems, separator="; ")
        raise ConfigError(f"init_lora_weights {init_lora_weights!r} cannot be used: {shown}")


def checkpoint_weights(model: nn.Module, names: Iterable[str], init: str) -> CheckpointWeights:
    """Returns the weights of these layers in the checkpoint that the model was loaded from, by their names.

    Empty for an initialization that does not need them. Raises CheckpointError if there is no such checkpoint, or it is
    packed.
    """
    if parse_init(init)[0] != "loftq":
        return {}
    folder = hub.model_folder(model)
    if folder is None or not (folder / hub.CONFIG_FILE).is_file():
        raise CheckpointError(
            "init_lora_weights 'loftq' needs the checkpoint that the model was packed from; it has none"
        )
    files = full_precision_tensors(folder)
    if files is None and hub.quantization_config(folder) is not None:
        raise CheckpointError(
            f"init_lora_weights 'loftq' needs weights as they were before packing; {folder} holds packed ones"
        )
    empty = hub.empty_model(hub.read_config(folder), torch.float32, type(model))
    architecture.tie(empty)
    stored = tensors_for_model(empty, folder, files or TensorFiles(folder).stored, ignore_unexpected=True).by_name
    missing = [name for name in names if f"{name}.weight" not in stored]
    if missing:
        raise CheckpointError(f"{folder} has no weight for: {listing(missing)}")
    # The folder is not a packed one, so all of its tensors are plain.
    return {f"{name}.weight": cast("LazyTensor", stored[f"{name}.weight"]) for name in names}


def initialize_(layer: LoraLayer, name: str, init: str, originals: CheckpointWeights) -> None:
    """Initializes A, B and the variant's other parameters of a layer. `loftq:N` replaces its base, too."""
    initializer, rounds = parse_init(init)
    check_signals()
    INITIALIZERS[initializer](layer, name, originals)
    for _ in range(rounds - 1):
        check_signals()
        _repack_base_(layer, name, originals)
        INITIALIZERS[initializer](layer, name, originals)
    layer.variant.reset_parameters_(layer)
    release(*layer.base_layer.parameters(), *layer.base_layer.buffers())  # what was read of a base on disk


def repacked(old: PackedWeight, matrix: Tensor, name: str) -> PackedWeight:
    """Returns another matrix `(out, in)` packed like `old`. Raises QuantizationError if it cannot be packed."""
    config = QuantConfig(old.format, old.blocksize, old.double_quant, int8_activations=old.int8_activations)
    new = PackedWeight.of(matrix, config, name=name)
    new.of_checkpoint, new.plain_dtype = False, old.plain_dtype
    return new


def count_holders(model: nn.Module, weight: Weight) -> int:
    """Returns how many modules have this weight object: more than one if it is tied."""
    return sum(getattr(module, "weight", None) is weight for module in model.modules())
