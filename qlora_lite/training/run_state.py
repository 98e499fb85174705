"""What a run is between two steps: all that the steps after it depend on, to and from files (safetensors and JSON).

state.json               settings, base, machine, place in the batches, what JSON can hold of the rest
trained.safetensors      A, B and whatever else learns, and starts they are counted from, as they are in memory
optimizer.safetensors    the optimizer's states
random.safetensors       torch's generators, now and before the first batch of the epoch
metrics.jsonl            a line for each step so far
adapter/                 the same adapter as peft reads it
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lite.checkpoints.base_identity import json_hash
from qlora_lite.checkpoints.files import new_file, write_json
from qlora_lite.checkpoints.safetensors_write import planned, raw_bytes, write_safetensors
from qlora_lite.compute.environment import arithmetic
from qlora_lite.compute.random_state import RandomSources, RandomState
from qlora_lite.compute.slicing import rows_that_fit
from qlora_lite.data.stream import BatchStream, Position
from qlora_lite.errors import CheckpointError, listing
from qlora_lite.lora.adapters import lora_layers
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.lora.peft.save_load import save_adapter
from qlora_lite.lora.variants import reference_tensors
from qlora_lite.signals import check_signals
from qlora_lite.training.config import TrainConfig
from qlora_lite.training.optim import load_optimizer_state_, optimizer_state
from qlora_lite.training.run_checkpoints import (
    ADAPTER_FOLDER,
    EPOCH,
    METRICS_FILE,
    NOW,
    OPTIMIZER_FILE,
    RANDOM_FILE,
    STATE_FILE,
    TRAINED_FILE,
    VERSION,
    StoredState,
    read_state_file,
)

# Settings that change what is saved or kept in memory, and no number of the result.
FREE_SETTINGS = ("save_steps", "keep_last", "keep_best", "checkpointing")
SHOWN = 6

# Rows of a tensor that are copied at a time where its bytes do not lie one after the other, or elsewhere.
SLICE_BYTES = 8 << 20
# Facts of packed weights and layers that decide what they compute.
FACTS = ("format", "blocksize", "double_quant", "int8_activations", "compute_dtype", "transposed")
# Of a model's configuration, what says where it came from or by whom it was written.
ORIGINS = ("_name_or_path", "transformers_version")


def _as_json(value: Any) -> Any:
    """What a value is once it was written and read: tuples are lists, keys strings."""
    return json.loads(json.dumps(value, default=str))


def _differences(what: str, then: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    keys = sorted({*then, *here})
    return [
        f"{what}{key} was {then.get(key)!r} and is {here.get(key)!r}" for key in keys if then.get(key) != here.get(key)
    ]


@dataclass
class RunState:
    """The parts of a run that make up its state, and the moment between two steps that was last marked.

    facts: of the loop itself (JSON). metrics: of each step so far.
    """

    model: nn.Module
    trained: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    stream: BatchStream
    sources: RandomSources
    metrics: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    _random: RandomState | None = None
    _position: Position | None = None
    _base: dict[str, str] | None = None

    @property
    def steps(self) -> int:
        """How many steps are done."""
        return len(self.metrics)

    def mark(self, metrics: dict[str, Any], facts: dict[str, Any]) -> None:
        """A step is done. What `write` writes until the next mark is the state now, also in the middle of a step:
        until its update only random numbers and batches move on."""
        self.metrics.append(metrics)
        self.facts = facts
        self._random, self._position = self.sources.capture(), self.stream.position()

    def mean_loss(self) -> float:
        """Of the steps since the checkpoint before, which is `save_steps` ago; of the last one without that."""
        losses = [step["loss"] for step in self.metrics[-(self.config.save_steps or 1) :]]
        return float(sum(losses) / len(losses))

    def _described(self) -> dict[str, dict[str, Any]]:
        """What must be the same in a run that goes on from here."""
        if self._base is None:
            self._base = base_fingerprint(self.model)
        settings = {name: value for name, value in asdict(self.config).items() if name not in FREE_SETTINGS}
        adapters = {
            name: [layer.rank, layer.alpha, layer.dropout, layer.use_rslora, layer.variant.name, layer.lora_A.dtype]
            for name, layer in lora_layers(self.model).items()
        }
        parts = {"settings": settings, "adapters": adapters, "base": self._base}
        return _as_json(parts | {"machine": arithmetic(self.sources.device)})  # type: ignore[no-any-return]

    def _tensors(self) -> dict[str, Tensor]:
        starts = {
            f"{name}.{part}": value
            for name, layer in lora_layers(self.model).items()
            for part, value in reference_tensors(layer).items()
        }
        return {**self.trained, **starts}

    def write(self, folder: Path) -> None:
        """Writes the state of the last mark into an empty folder, each file synced to disk."""
        assert self._random is not None and self._position is not None
        save_adapter(self.model, folder / ADAPTER_FOLDER)
        write_safetensors(folder / TRAINED_FILE, {n: planned(value) for n, value in self._tensors().items()})
        tensors, plain = optimizer_state(self.optimizer, self.trained)
        write_safetensors(folder / OPTIMIZER_FILE, {name: planned(value) for name, value in tensors.items()})
        start = self._position.start
        states = {NOW + name: value for name, value in self._random.tensors.items()}
        states |= {EPOCH + name: value for name, value in start.tensors.items()}
        write_safetensors(folder / RANDOM_FILE, {name: planned(value) for name, value in states.items()})
        position = {name: getattr(self._position, name) for name in ("epoch", "taken", "digest", "count")}
        self.write_metrics(folder / METRICS_FILE)
        state = {
            "version": VERSION,
            "step": self.steps,
            "mean_loss": self.mean_loss(),
            **self._described(),
            "checkpointing": self.config.checkpointing,
            "batches": position,
            "random": {"now": self._random.plain, "epoch": start.plain},
            "optimizer": plain,
            "facts": self.facts,
        }
        write_json(folder / STATE_FILE, state)

    def write_metrics(self, path: Path) -> None:
        """A line for each step so far, in place of what was there."""
        with new_file(path, overwrite=True) as file:
            file.writelines(json.dumps(step).encode() + b"\n" for step in self.metrics)

    def check_same(self, folder: Path) -> None:
        """CheckpointError, listing what, if this run is not the one that the checkpoint is of."""
        state = read_state_file(folder)
        here = self._described()
        problems = _differences("", state["settings"], here["settings"])
        problems += _differences("the adapter of ", state["adapters"], here["adapters"])
        problems += [
            f"the base has other {name}" for name in here["base"] if state["base"].get(name) != here["base"][name]
        ]
        problems += _differences("machine: ", state["machine"], here["machine"])
        if problems:
            raise CheckpointError(
                f"{folder} cannot be resumed exactly: {listing(problems, SHOWN, '; ')}; make it as it was, "
                f"or begin a new run from {folder / ADAPTER_FOLDER} with load_adapter_"
            )

    def restore_(self, folder: Path) -> None:
        """Has model, optimizer and batches be as they were. CheckpointError for what does not fit."""
        found, here = StoredState.read(folder), self._tensors()
        kinds = [{n: (value.shape, value.dtype) for n, value in side.items()} for side in (found.trained, here)]
        if kinds[0] != kinds[1]:
            other = sorted(name for name in {*found.trained, *here} if kinds[0].get(name) != kinds[1].get(name))
            raise CheckpointError(f"{folder} has other tensors that learn than the model: {listing(other, SHOWN)}")
        with torch.no_grad():
            for name, value in here.items():
                value.copy_(found.trained[name])
        load_optimizer_state_(self.optimizer, self.trained, found.optimizer, found.plain["optimizer"])
        self.stream.go_to(found.position)
        self.metrics, self.facts = found.metrics, found.plain["facts"]
        if found.plain["checkpointing"] != self.config.checkpointing:
            self.facts["dial"] = None
        self._random, self._position = found.now, self.stream.position()

    def restore_random(self) -> None:
        """Has random numbers be as they were: the last thing before a step, for others draw too (rich, on import)."""
        if self._random is not None:
            self.sources.restore(self._random)


def _frozen(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that training leaves alone: no adapters, nor the starts that they are counted from."""
    own = {
        id(value)
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
        for value in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
    }
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if id(value) not in own and not value.requires_grad:
            yield name, value


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    whole = tensor.detach()
    if whole.dim() == 0 or (whole.is_contiguous() and whole.device.type == "cpu"):
        parts: Any = (whole,)
    else:
        parts = whole.split(rows_that_fit(SLICE_BYTES, whole[:1].nbytes))
    for part in parts:
        yield raw_bytes(part)


def base_fingerprint(model: nn.Module) -> dict[str, str]:
    """SHA-256 sums of a base: `layout` (names, shapes, dtypes, formats), `values` (all bytes), `config`.

    Every byte counts, packed ones as they are packed: 1 to 2 GB are summed in a second.
    """
    layout: list[object] = []
    values = hashlib.sha256()
    for name, tensor in _frozen(model):
        layout.append([name, list(tensor.shape), str(tensor.dtype)])
        for piece in _pieces(tensor):
            check_signals()
            values.update(piece)
    for name, module in model.named_modules():
        layout.append([name, type(module).__name__, {fact: getattr(module, fact, None) for fact in FACTS}])
    describe = getattr(getattr(model, "config", None), "to_dict", None)
    config = {} if describe is None else {key: value for key, value in describe().items() if key not in ORIGINS}
    return {"layout": json_hash(layout), "values": values.hexdigest(), "config": json_hash(config)}
