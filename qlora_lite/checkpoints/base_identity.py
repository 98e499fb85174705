"""Which checkpoint an adapter was trained on, in a small file beside it: a wrong base is told before it is loaded.

`qlora_lite_base.json` holds the sizes in the checkpoint's config, and two SHA-256 sums of its tensors in the order of
their names: of names and shapes, and of a sample of the values. The sample is all of a tensor of up to 4,096 values,
and of a larger one 4 runs of 1,024 values, evenly spread from its first to its last, each rounded to bf16. So one file
or shards, and copies in bf16 or in a wider dtype, are the same base. Another revision, or one tensor that was trained,
is another one; a change that lies wholly between the runs, or is below bf16's steps, is not seen.

A checkpoint that `save_quantized` wrote has this file too: it says what was packed, and sums of what was written, so
that the file is not believed beside other tensors. Other programs read none of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lite.checkpoints import hub
from qlora_lite.checkpoints.files import excerpt, read_json, write_json
from qlora_lite.checkpoints.safetensors_read import StoredTensor, TensorFiles
from qlora_lite.checkpoints.safetensors_write import raw_bytes
from qlora_lite.errors import CheckpointError
from qlora_lite.quantization.packed_weight import PackedWeight

BASE_FILE = "qlora_lite_base.json"
VERSION = 1
KIND = "model_type"
SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "vocab_size"),
)
RUNS, RUN_VALUES = 4, 1024
SHA256 = re.compile(r"[0-9a-f]{64}")
# On a model: what the checkpoint was that its weights were read from.
KNOWN = "checkpoint_base"

# In adapter_config.json, where peft passes over what it does not know.
PACKED_HASH_KEY = "packed_base_sha256"
LOAD_REPACKED_HINT = "load the base that save_quantized wrote of the model under that adapter"


@dataclass(frozen=True)
class WeightHashes:
    """SHA-256 sums of a checkpoint's tensors: of names and shapes, and of sampled values.

    packed: whether those are codes and statistics of something that is not known.
    """

    layout: str
    sample: str
    packed: bool = False


@dataclass(frozen=True)
class BaseIdentity:
    """What is known of a base. model: kind and sizes; weights: None where there are no files to sum.

    written: of a packed checkpoint that says what it was packed from, sums of its own tensors.
    """

    model: Mapping[str, int | str]
    weights: WeightHashes | None
    written: WeightHashes | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        return {"version": VERSION, **asdict(self)}

    def described(self) -> str:
        """One line for a person."""
        facts = ", ".join(f"{fact} {self.model[fact]}" for fact in (KIND, *SIZES) if fact in self.model)
        weights = "unknown" if self.weights is None else self.weights.sample[:12]
        return f"{facts or 'a model of unknown kind'}; weights {weights}"


def _sampled(stored: StoredTensor) -> Iterator[Tensor]:
    count = math.prod(stored.shape)
    flat = replace(stored, shape=(count,))
    if count <= RUNS * RUN_VALUES:
        yield flat.read()
        return
    for run in range(RUNS):
        start = run * (count - RUN_VALUES) // (RUNS - 1)
        yield flat.rows(start, start + RUN_VALUES)


def _rounded(values: Tensor) -> Tensor:
    """The bits of floats in bf16, to nearest and even; in whole numbers, since processors differ in the smallest."""
    if not values.is_floating_point():
        return values
    bits = values.float().view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(torch.int16)


def weight_hashes(stored: Mapping[str, StoredTensor], packed: bool = False) -> WeightHashes:
    """Sums of these tensors; 16 KiB of each are read at the most."""
    names, sample = sorted(stored), hashlib.sha256()
    for name in names:
        for run in _sampled(stored[name]):
            sample.update(raw_bytes(_rounded(run)))
    return WeightHashes(json_hash([[name, stored[name].shape] for name in names]), sample.hexdigest(), packed)


def _facts(config: Any) -> dict[str, int | str]:
    """Kind and sizes of the language model that a transformers config describes, those that it says."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    said = {fact: getattr(text, fact, None) for fact in (KIND, *SIZES)}
    return {fact: value for fact, value in said.items() if isinstance(value, (int, str))}


def checkpoint_identity(folder: Path, config: Any) -> BaseIdentity:
    """What a checkpoint's folder is; of one that `save_quantized` wrote, what it was packed from.

    config: transformers' of that folder. CheckpointError for damaged files, or a file that was written beside others.
    """
    files = TensorFiles.of(folder)
    weights = None if files is None else weight_hashes(files.stored, hub.quantization_config(folder) is not None)
    if weights is None or not weights.packed:
        return BaseIdentity(_facts(config), weights)
    said = read_base_identity(folder)
    if said is None:
        return BaseIdentity(_facts(config), weights)
    if said.written != weights:
        raise CheckpointError(
            f"{folder / BASE_FILE} was written for other tensors than lie beside it; save the checkpoint again, or "
            f"remove that file, and nothing says what it was packed from"
        )
    return replace(said, written=None)


def checkpoint_identity_or_error(folder: Path, config: Any) -> BaseIdentity | CheckpointError:
    """`checkpoint_identity`, or the error that it raises, for a caller that loads the tensors next.

    The identity is computed before loading, so that it adds nothing to the peak of memory. Loading reads every tensor
    and reports damage more precisely, so the caller raises this error only after it.
    """
    try:
        return checkpoint_identity(folder, config)
    except CheckpointError as error:
        return error


def set_base_identity_(model: nn.Module, base: BaseIdentity) -> None:
    """Notes on a model what its weights were read from."""
    setattr(model, KNOWN, base)


def model_identity(model: Any) -> BaseIdentity | None:
    """What the checkpoint is that a model came from; None for a model without a config.

    A model that load_quantized made knows it. Of another one the folder that it names is summed when this is first
    asked, if it is there and can be read here; without one only the config is known. Nothing is said of weights that
    LoftQ packed anew.
    """
    base: BaseIdentity | None = getattr(model, KNOWN, None)
    if (config := getattr(model, "config", None)) is not None:
        base = base or _summed(model)
        if base is None or _facts(config) != base.model:  # it was changed since: tokens were added, say
            return BaseIdentity(_facts(config), None)
    return replace(base, weights=None) if base is not None and repacked_weights(model) else base


def _summed(model: Any) -> BaseIdentity | None:
    """What lies in the folder that a model names, as far as it can be read, which is remembered; None if it is gone."""
    if (folder := _folder_there(model)) is None:
        return None
    try:
        base = checkpoint_identity(folder, hub.read_config(folder))
    except CheckpointError:  # code of its own, or tensors in fp8, say: its adapter is to be saved all the same
        base = BaseIdentity(_facts(model.config), None)
    set_base_identity_(model, base)
    return base


def _folder_there(model: Any) -> Path | None:
    """The folder that a model came from; None if it is gone, since its adapter is to be saved all the same."""
    try:
        folder = hub.model_folder(model)
    except CheckpointError:
        return None
    return folder if folder is not None and (folder / hub.CONFIG_FILE).is_file() else None


def write_base_identity(folder: Path, model: nn.Module) -> None:
    """Writes what a model came from beside its adapter; nothing for a model without a config."""
    if (base := model_identity(model)) is not None:
        write_json(folder / BASE_FILE, base.to_json())


def write_packed_base_identity(folder: Path, model: nn.Module) -> None:
    """Writes what a model came from beside its packed tensors, if that is known of its weights."""
    base = model_identity(model)
    # safetensors writes below a path that is no text, and reads from none.
    readable = os.fsencode(folder).decode(errors="replace") == str(folder)
    if base is not None and base.weights is not None and readable:
        written = weight_hashes(TensorFiles(folder).stored, packed=True)
        write_json(folder / BASE_FILE, replace(base, written=written).to_json())


def _read_sums(said: Any, path: Path, what: str) -> WeightHashes | None:
    if said is None:
        return None
    if not isinstance(said, dict) or set(said) != {"layout", "sample", "packed"} or type(said["packed"]) is not bool:
        raise CheckpointError(f"{path}: {what} should be an object of layout, sample and packed; got {excerpt(said)}")
    for name in ("layout", "sample"):
        if not isinstance(said[name], str) or not SHA256.fullmatch(said[name]):
            raise CheckpointError(f"{path}: {name} of {what} should be a SHA-256 in hex; got {excerpt(said[name])}")
    return WeightHashes(**said)


def read_base_identity(folder: Path) -> BaseIdentity | None:
    """What the file in a folder says; None if it is not there. CheckpointError for one that says something else."""
    path = folder / BASE_FILE
    if not os.path.lexists(path):
        return None
    said = read_json(path)
    if type(said.get("version")) is not int or said["version"] != VERSION:
        got = excerpt(said.get("version"))
        raise CheckpointError(f"{path} is of version {got}; this one reads {VERSION}; remove it to go without")
    if unknown := sorted(said.keys() - {"version", "model", "weights", "written"}):
        raise CheckpointError(f"{path} says {excerpt(unknown[0])}, which is not known; remove the file to go without")
    model = said.get("model")
    if not isinstance(model, dict) or not model.keys() <= {KIND, *SIZES}:
        raise CheckpointError(f"{path}: model should be an object of {KIND}, {', '.join(SIZES)}; got {excerpt(model)}")
    for fact, value in model.items():
        if type(value) is not (str if fact == KIND else int):
            kind = "a string" if fact == KIND else "an integer"
            raise CheckpointError(f"{path}: {fact} should be {kind}; got {excerpt(value)}")
    weights, written = (_read_sums(said.get(key), path, key) for key in ("weights", "written"))
    return BaseIdentity(model, weights, written)


def _unlike(there: BaseIdentity, here: BaseIdentity) -> str:
    """How two bases differ; empty if nothing says that they do."""
    both = [fact for fact in (KIND, *SIZES) if fact in there.model and fact in here.model]
    if other := [fact for fact in both if there.model[fact] != here.model[fact]]:
        kind = "another model" if KIND in other else "a model of another size"
        said = (f"{fact} {excerpt(there.model[fact])} there and {excerpt(here.model[fact])} here" for fact in other)
        return f"{kind} ({', '.join(said)})"
    one, two = there.weights, here.weights
    # One model may be saved under other names, with tied weights once or twice, or packed: then nothing is proved.
    if one is None or two is None or one.layout != two.layout:
        return ""
    return (
        ""
        if one.sample == two.sample
        else "other weights of the same shapes (another revision, trained further, or in fp16)"
    )


def _compare(adapter: Path, there: BaseIdentity, here: BaseIdentity | None, base: str) -> list[str]:
    """CheckpointError if what an adapter was trained on differs from `here`, which errors call `base`.

    Which of sizes and weights both say; nothing of a base of which nothing is known.
    """
    if here is None:
        return []
    if unlike := _unlike(there, here):
        raise CheckpointError(
            f"{adapter} was trained on {unlike} than {base}; name the base that it was trained on, or ask for any_base "
            f"(--any-base) if this one is meant"
        )
    weights, others = there.weights, here.weights
    known = weights is not None and others is not None and weights.layout == others.layout
    return ["sizes"] * bool(there.model.keys() & here.model.keys()) + ["weights"] * known


def check_trained_on_model(adapter: Path, model: nn.Module) -> None:
    """CheckpointError if an adapter on disk was trained on another base than a model's. No tensor of either is read."""
    there = read_base_identity(adapter)
    if there is None:
        return
    if there.weights is not None and repacked_weights(model):
        raise CheckpointError(
            f"{adapter} was trained on weights as a checkpoint has them, and LoftQ packed this model's anew; load the "
            f"checkpoint, or ask for any_base (--any-base) if this model is meant"
        )
    _compare(adapter, there, model_identity(model), "this model's base")


def check_trained_on_checkpoint(adapter: Path, folder: Path) -> list[str]:
    """The same for a checkpoint's folder, of which config and samples are read.

    Gives which of "sizes" and "weights" both say, and are the same.
    """
    there = read_base_identity(adapter)
    return (
        []
        if there is None
        else _compare(adapter, there, checkpoint_identity(folder, hub.read_config(folder)), str(folder))
    )


def repacked_weights(model: nn.Module) -> list[PackedWeight]:
    """The packed weights of a model that are not its checkpoint's."""
    return [module for module in model.modules() if isinstance(module, PackedWeight) and not module.of_checkpoint]


def packed_weights_hash(weights: Iterable[tuple[str, PackedWeight]]) -> str:
    """SHA-256, in hex, of the names of layers and the bytes of their packed weights, in the order that they come in."""
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(f"{name} {weight.format} {weight.blocksize} {tuple(weight.shape)}\n".encode())
        for _, buffer in sorted(weight.state_dict().items()):
            digest.update(raw_bytes(buffer))
    return digest.hexdigest()


def packed_weights_match(digest: str, weights: Mapping[str, Any]) -> bool:
    """Whether these are the packed weights, by name of layer, that an adapter was saved for."""
    if not all(isinstance(weight, PackedWeight) for weight in weights.values()):
        return False
    return packed_weights_hash(sorted(weights.items())) == digest


def json_hash(value: object) -> str:
    """SHA-256, in hex, of plain data as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
