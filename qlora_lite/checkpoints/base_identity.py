"""Identifies the checkpoint that an adapter was trained on, so that a wrong base is refused before it is loaded.

An adapter's folder holds `qlora_lite_base.json` with the sizes in the checkpoint's config and two SHA-256 hashes of its
tensors in the order of their names: one of names and shapes, one of sampled values. A tensor of up to 4,096 values is
sampled whole, a larger one by 4 runs of 1,024 values, spread evenly from its first value to its last; values are
rounded to bf16. One file and shards, bf16 and wider dtypes therefore have the same identity. Another revision, or one
trained tensor, changes it. A change between the runs, or smaller than bf16 resolves, is not detected.

`save_quantized` writes the file too: it identifies the checkpoint that was packed, and holds hashes of the packed
tensors, so that a file next to other tensors is refused. Packing by rounding gives the same weights each time;
calibrated ones (calibration/) differ by their text, and the file has a hash of them. Other programs ignore the file.
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

import torch
from torch import Tensor, nn

from qlora_lite.architecture import config_value
from qlora_lite.checkpoints import hub
from qlora_lite.checkpoints.files import excerpt, read_json, write_json
from qlora_lite.checkpoints.safetensors_read import StoredTensor, TensorFiles
from qlora_lite.checkpoints.safetensors_write import raw_bytes
from qlora_lite.errors import CheckpointError, listing
from qlora_lite.quantization.packed_weight import PackedWeight

BASE_FILE = "qlora_lite_base.json"
VERSION = 1
MODEL_TYPE = "model_type"
SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "vocab_size"),
)
RUNS, RUN_VALUES = 4, 1024
SHA256 = re.compile(r"[0-9a-f]{64}")
# The attribute of a model that holds the identity of its checkpoint.
IDENTITY_ATTRIBUTE = "checkpoint_base"

# The key in adapter_config.json for the hash of weights that LoftQ packed; peft ignores keys that it does not know.
PACKED_HASH_KEY = "packed_base_sha256"
LOAD_REPACKED_HINT = "load the base that save_quantized wrote of the model under that adapter"


@dataclass(frozen=True)
class WeightHashes:
    """SHA-256 hashes of a checkpoint's tensors: of names and shapes (layout), and of sampled values (sample).

    packed: whether the tensors are packed, and what they were packed from is unknown.
    """

    layout: str
    sample: str
    packed: bool = False


@dataclass(frozen=True)
class BaseIdentity:
    """The identity of a base checkpoint.

    model: type and sizes from its config. weights: hashes of its tensors, None without safetensors files. written: in
    the file of a packed checkpoint, hashes of the packed tensors; `weights` are then those of what was packed.
    calibration: SHA-256 of the packed weights if calibration chose their codes, so that they are not those that
    rounding gives; else None.
    """

    model: Mapping[str, int | str]
    weights: WeightHashes | None
    written: WeightHashes | None = None
    calibration: str | None = None

    def to_json(self) -> dict[str, object]:
        """The contents of `qlora_lite_base.json`; releases from before calibration read it where there is none."""
        fields = asdict(self)
        return {"version": VERSION, **{key: fields[key] for key in fields if key != "calibration" or fields[key]}}

    def described(self) -> str:
        """Returns one line for people to read."""
        sizes = ", ".join(f"{key} {self.model[key]}" for key in (MODEL_TYPE, *SIZES) if key in self.model)
        weights = "unknown" if self.weights is None else self.weights.sample[:12]
        calibrated = "" if self.calibration is None else f"; calibrated {self.calibration[:12]}"
        return f"{sizes or 'a model of unknown type'}; weights {weights}{calibrated}"


def _sampled(stored: StoredTensor) -> Iterator[Tensor]:
    """Yields the values of a tensor that are hashed."""
    count = math.prod(stored.shape)
    flat = replace(stored, shape=(count,))
    if count <= RUNS * RUN_VALUES:
        yield flat.read()
        return
    for run in range(RUNS):
        start = run * (count - RUN_VALUES) // (RUNS - 1)
        yield flat.rows(start, start + RUN_VALUES)


def _rounded(values: Tensor) -> Tensor:
    """Returns the bits of floats rounded to bf16 (nearest, ties to even).

    In integer arithmetic, because processors treat subnormal numbers differently.
    """
    if not values.is_floating_point():
        return values
    bits = values.float().view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(torch.int16)


def weight_hashes(stored: Mapping[str, StoredTensor], packed: bool = False) -> WeightHashes:
    """Returns the hashes of these tensors. At most 16 KiB of each are read."""
    names, sample = sorted(stored), hashlib.sha256()
    for name in names:
        for run in _sampled(stored[name]):
            sample.update(raw_bytes(_rounded(run)))
    return WeightHashes(json_hash([[name, stored[name].shape] for name in names]), sample.hexdigest(), packed)


def _type_and_sizes(config: object) -> dict[str, int | str]:
    """Returns model type and sizes of the language model of a transformers config, those that it has."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = {key: config_value(text, key) for key in (MODEL_TYPE, *SIZES)}
    return {key: value for key, value in found.items() if isinstance(value, (int, str))}


def checkpoint_identity(folder: Path, config: object) -> BaseIdentity:
    """Returns the identity of a checkpoint folder; for one that `save_quantized` wrote, of what was packed.

    config: the transformers config of that folder. Raises CheckpointError for damaged files, and for a
    `qlora_lite_base.json` that was written for other tensors.
    """
    files = TensorFiles.of(folder)
    weights = None if files is None else weight_hashes(files.stored, hub.quantization_config(folder) is not None)
    if weights is None or not weights.packed:
        return BaseIdentity(_type_and_sizes(config), weights)
    packed_from = read_base_identity(folder)
    if packed_from is None:
        return BaseIdentity(_type_and_sizes(config), weights)
    if packed_from.written != weights:
        raise CheckpointError(
            f"{folder / BASE_FILE} was written for other tensors than {folder} holds; save the checkpoint again, or "
            f"remove that file to go without a record of what was packed"
        )
    return replace(packed_from, written=None)


def checkpoint_identity_or_error(folder: Path, config: object) -> BaseIdentity | CheckpointError:
    """`checkpoint_identity`, or the error that it raises, for a caller that loads the tensors next.

    The identity is computed before loading, so that it adds nothing to the peak of memory. Loading reads every tensor
    and reports damage more precisely, so the caller raises this error only after it.
    """
    try:
        return checkpoint_identity(folder, config)
    except CheckpointError as error:
        return error


def set_base_identity_(model: nn.Module, base: BaseIdentity) -> None:
    """Stores on a model the identity of the checkpoint that its weights were read from."""
    setattr(model, IDENTITY_ATTRIBUTE, base)


def model_identity(model: nn.Module) -> BaseIdentity | None:
    """Returns the identity of the checkpoint that a model was loaded from; None for a model without a config.

    `load_quantized` stores it on the model. For any other model the folder that its config names is hashed on the first
    call, if it exists and can be read; otherwise only the config is known. Weights that LoftQ packed have no hashes.
    """
    base: BaseIdentity | None = getattr(model, IDENTITY_ATTRIBUTE, None)
    if (config := getattr(model, "config", None)) is not None:
        base = base or _hashed_folder(model)
        if base is None or _type_and_sizes(config) != base.model:  # the model was changed, e.g. by adding tokens
            return BaseIdentity(_type_and_sizes(config), None)
    return replace(base, weights=None) if base is not None and repacked_weights(model) else base


def _hashed_folder(model: nn.Module) -> BaseIdentity | None:
    """Computes the identity of the folder that a model names, and stores it on the model; None if it is gone."""
    if (folder := _existing_folder(model)) is None:
        return None
    try:
        base = checkpoint_identity(folder, hub.read_config(folder))
    except CheckpointError:  # e.g. remote code, or fp8 tensors; the adapter is saved anyway
        base = BaseIdentity(_type_and_sizes(model.config), None)
    set_base_identity_(model, base)
    return base


def _existing_folder(model: nn.Module) -> Path | None:
    """Returns the folder that a model came from; None, not an error, if it is gone: the adapter is saved anyway."""
    try:
        folder = hub.model_folder(model)
    except CheckpointError:
        return None
    return folder if folder is not None and (folder / hub.CONFIG_FILE).is_file() else None


def write_base_identity(folder: Path, model: nn.Module) -> None:
    """Writes the identity of a model's base to its adapter's folder; nothing for a model without a config."""
    if (base := model_identity(model)) is not None:
        write_json(folder / BASE_FILE, base.to_json())


def write_packed_base_identity(folder: Path, model: nn.Module) -> None:
    """Writes the identity of what was packed to the folder of the packed checkpoint, if its hashes are known."""
    base = model_identity(model)
    # safetensors writes to a path that is not valid UTF-8, but cannot read from it.
    readable = os.fsencode(folder).decode(errors="replace") == str(folder)
    if base is not None and base.weights is not None and readable:
        written = weight_hashes(TensorFiles(folder).stored, packed=True)
        write_json(folder / BASE_FILE, replace(base, written=written).to_json())


def _parsed_hashes(value: object, path: Path, key: str) -> WeightHashes | None:
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) != {"layout", "sample", "packed"} or type(value["packed"]) is not bool:
        raise CheckpointError(f"{path}: {key} should be an object of layout, sample and packed; got {excerpt(value)}")
    for name in ("layout", "sample"):
        if not isinstance(value[name], str) or not SHA256.fullmatch(value[name]):
            raise CheckpointError(f"{path}: {name} of {key} should be a SHA-256 in hex; got {excerpt(value[name])}")
    return WeightHashes(**value)


def read_base_identity(folder: Path) -> BaseIdentity | None:
    """Reads `qlora_lite_base.json` of a folder; None if there is none. Raises CheckpointError for a malformed one."""
    path = folder / BASE_FILE
    if not os.path.lexists(path):
        return None
    value = read_json(path)
    if type(value.get("version")) is not int or value["version"] != VERSION:
        got = excerpt(value.get("version"))
        raise CheckpointError(f"{path} has version {got}; only version {VERSION} can be read; remove it to go without")
    if unknown := sorted(value.keys() - {"version", "model", "weights", "written", "calibration"}):
        raise CheckpointError(
            f"{path} has unknown keys: {listing(map(excerpt, unknown), 4)}; remove the file to go without"
        )
    model = value.get("model")
    if not isinstance(model, dict) or not model.keys() <= {MODEL_TYPE, *SIZES}:
        keys = ", ".join((MODEL_TYPE, *SIZES))
        raise CheckpointError(f"{path}: model should be an object of {keys}; got {excerpt(model)}")
    for key, size in model.items():
        if type(size) is not (str if key == MODEL_TYPE else int):
            expected = "a string" if key == MODEL_TYPE else "an integer"
            raise CheckpointError(f"{path}: {key} should be {expected}; got {excerpt(size)}")
    weights, written = (_parsed_hashes(value.get(key), path, key) for key in ("weights", "written"))
    calibration = value.get("calibration")
    if calibration is not None and not (isinstance(calibration, str) and SHA256.fullmatch(calibration)):
        raise CheckpointError(f"{path}: calibration should be a SHA-256 in hex; got {excerpt(calibration)}")
    return BaseIdentity(model, weights, written, calibration)


def _difference(trained_on: BaseIdentity, given: BaseIdentity) -> str:
    """Describes how two bases differ; empty if no difference is known."""
    both = [key for key in (MODEL_TYPE, *SIZES) if key in trained_on.model and key in given.model]
    if different := [key for key in both if trained_on.model[key] != given.model[key]]:
        model = "another model" if MODEL_TYPE in different else "a model of another size"
        values = (f"{key} {excerpt(trained_on.model[key])}, not {excerpt(given.model[key])}" for key in different)
        return f"{model} ({'; '.join(values)})"
    one, two = trained_on.weights, given.weights
    # One model may be saved under other names, with tied weights once or twice, or packed. A different layout therefore
    # proves nothing.
    if one is None or two is None or one.layout != two.layout:
        return ""
    if one.sample != two.sample:
        return "other weights of the same shapes (another revision, trained further, or in fp16)"
    if trained_on.calibration == given.calibration:
        return ""
    return f"weights packed {_packed_how(trained_on)}, not {_packed_how(given)},"


def _packed_how(base: BaseIdentity) -> str:
    return "by rounding" if base.calibration is None else f"with calibration {base.calibration[:12]}"


def _check_same(adapter: Path, trained_on: BaseIdentity, given: BaseIdentity | None, base: str) -> list[str]:
    """Returns which of "sizes" and "weights" were compared and are equal. base: the name of `given` in the error.

    Raises CheckpointError if they differ.
    """
    if given is None:
        return []
    if difference := _difference(trained_on, given):
        raise CheckpointError(
            f"{adapter} was trained on {difference} than {base}; name the base that it was trained on, or ask for "
            f"any_base (--any-base) if this one is meant"
        )
    weights, others = trained_on.weights, given.weights
    compared = weights is not None and others is not None and weights.layout == others.layout
    return ["sizes"] * bool(trained_on.model.keys() & given.model.keys()) + ["weights"] * compared


def check_trained_on_model(adapter: Path, model: nn.Module) -> None:
    """Raises CheckpointError if an adapter on disk was trained on another base than a model's. Reads no tensor."""
    trained_on = read_base_identity(adapter)
    if trained_on is None:
        return
    if trained_on.weights is not None and repacked_weights(model):
        raise CheckpointError(
            f"{adapter} was trained on the weights of a checkpoint, and this model's were packed by LoftQ; load the "
            f"checkpoint, or ask for any_base (--any-base) if this model is meant"
        )
    _check_same(adapter, trained_on, model_identity(model), "this model's base")


def check_trained_on_checkpoint(adapter: Path, folder: Path) -> list[str]:
    """Raises CheckpointError if an adapter was trained on another base than the checkpoint in `folder`.

    Reads the config and the sampled values of the checkpoint. Returns which of "sizes" and "weights" were compared.
    """
    trained_on = read_base_identity(adapter)
    if trained_on is None:
        return []
    return _check_same(adapter, trained_on, checkpoint_identity(folder, hub.read_config(folder)), str(folder))


def repacked_weights(model: nn.Module) -> list[PackedWeight]:
    """Returns the packed weights of a model that differ from its checkpoint's, because LoftQ packed them."""
    return [module for module in model.modules() if isinstance(module, PackedWeight) and not module.of_checkpoint]


def packed_weights_hash(weights: Iterable[tuple[str, PackedWeight]]) -> str:
    """Returns the SHA-256, in hex, of the names of layers and the bytes of their packed weights, in the order given."""
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(f"{name} {weight.format} {weight.blocksize} {tuple(weight.shape)}\n".encode())
        for _, buffer in sorted(weight.state_dict().items()):
            digest.update(raw_bytes(buffer))
    return digest.hexdigest()


def packed_weights_match(digest: str, weights: Mapping[str, object]) -> bool:
    """Whether these weights, by name of layer, are the packed ones that an adapter was saved for."""
    packed = {name: weight for name, weight in weights.items() if isinstance(weight, PackedWeight)}
    return len(packed) == len(weights) and packed_weights_hash(sorted(packed.items())) == digest


def json_hash(value: object) -> str:
    """Returns the SHA-256, in hex, of plain data as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
