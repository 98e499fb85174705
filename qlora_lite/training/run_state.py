"""A run: everything that its next steps depend on, and how it is written to files and read from them.

state.json               settings, base, machine, position in the batches, and other plain data
trained.safetensors      the trained parameters and the reference tensors of variants, as they are in memory
optimizer.safetensors    the states of the optimizer
random.safetensors       the states of torch's generators, now and before the first batch of the epoch
metrics.jsonl            one line for each step and each evaluation
adapter/                 the adapter in peft's files
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TypedDict

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
from qlora_lite.lora.peft.card import TrainingRecord
from qlora_lite.lora.peft.save_load import save_adapter
from qlora_lite.lora.variants import reference_tensors
from qlora_lite.offload.mapped_file import release
from qlora_lite.progress.work import BYTES, working
from qlora_lite.sharding.base import whole_tensor
from qlora_lite.signals import check_signals
from qlora_lite.training.config import EXACT_MATCH, TrainConfig
from qlora_lite.training.decisions import Decisions
from qlora_lite.training.metrics import Evaluation, StepMetrics, lines_of
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
    StateFile,
    StoredRun,
    read_state_file,
)

# Of a setting that a run was written before, it had the default.
DEFAULTS = {setting.name: setting.default for setting in fields(TrainConfig)}
# Settings that change what is saved or kept in memory, but no number of the result.
FREE_SETTINGS = ("save_steps", "keep_last", "keep_best", "checkpointing")
SHOWN = 6

# Rows of a tensor that are copied at a time if its bytes are not contiguous, or on another device.
SLICE_BYTES = 8 << 20
# Attributes of packed weights and layers that decide what they compute.
PACKING_ATTRIBUTES = ("format", "blocksize", "double_quant", "int8_activations", "compute_dtype", "transposed")
# Entries of a model's configuration that say where it came from, and do not change what the model computes.
ORIGINS = ("_name_or_path", "transformers_version")


def training_record(metrics: Sequence[StepMetrics], held_out: tuple[float, float] | None = None) -> TrainingRecord:
    """Returns what a model card says of these steps. held_out: the loss of held-out examples before and after them."""
    tokens, rate = sum(step.tokens for step in metrics), max(step.learning_rate for step in metrics)
    return TrainingRecord(len(metrics), tokens, rate, metrics[0].loss, metrics[-1].loss, held_out)


class _Identity(TypedDict):
    """What must be the same in a run that is resumed; the keys are those in state.json."""

    settings: dict[str, object]
    adapters: dict[str, object]
    base: dict[str, object]
    machine: dict[str, object]


@dataclass(frozen=True)
class _BetweenSteps:
    """The part of a run's state that moves on before the next update."""

    random: RandomState
    position: Position
    decisions: Decisions


@dataclass
class Run:
    """A training run: everything that its next steps depend on.

    trained: the parameters that training changes, by name. optimizer: over these. sources: where random numbers come
    from; None for a run that is not saved. metrics: of each finished step. evaluations: of held-out batches.
    held_out_digest: of these batches; None before the first evaluation, and for a run that is not saved.
    decisions: found out in the first steps.
    """

    model: nn.Module
    trained: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    stream: BatchStream
    sources: RandomSources | None = None
    metrics: list[StepMetrics] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    held_out_digest: str | None = None
    decisions: Decisions = field(default_factory=Decisions)
    _last: _BetweenSteps | None = None
    _base: dict[str, object] | None = None

    @property
    def steps(self) -> int:
        """The number of finished steps."""
        return len(self.metrics)

    def finish_step(self, metrics: StepMetrics) -> None:
        """Notes that a step is finished. `write` then writes this state until the next step is finished.

        Until the update of the next step only random numbers, the position in the batches and decisions move on, so
        these are copied here.
        """
        self.metrics.append(metrics)
        if self.sources is not None:
            self._last = _BetweenSteps(self.sources.capture(), self.stream.position(), self.decisions)

    def record(self) -> TrainingRecord | None:
        """Returns what a model card says of the finished steps; None before the first.

        Held-out losses are on it if there was an evaluation before the first step and one after the last.
        """
        before = next((found.held_out_loss for found in self.evaluations if found.step == 0), None)
        last = self.last_evaluation()
        after = last.held_out_loss if last is not None and self.steps else None
        held_out = None if before is None or after is None else (before, after)
        return training_record(self.metrics, held_out) if self.metrics else None

    def last_evaluation(self) -> Evaluation | None:
        """Returns the evaluation after the last finished step; None if there was none."""
        return next((found for found in self.evaluations if found.step == self.steps), None)

    def drop_gradients(self) -> None:
        """Sets all gradients to None."""
        for parameter in self.trained.values():
            parameter.grad = None

    def mean_loss(self) -> float:
        """Returns the mean loss of the last `save_steps` steps; of the last step if that is None."""
        losses = [step.loss for step in self.metrics[-(self.config.save_steps or 1) :]]
        return float(sum(losses) / len(losses))

    def note_base(self) -> None:
        """Computes the fingerprint of the base, unless it is known. All processes must call it if it is in shares."""
        if self._base is None:
            self._base = dict(base_fingerprint(self.model))

    def _identity(self) -> _Identity:
        self.note_base()
        assert self._base is not None
        assert self.sources is not None
        identity: _Identity = {
            "settings": {name: value for name, value in asdict(self.config).items() if name not in FREE_SETTINGS},
            "adapters": {
                name: [layer.rank, layer.alpha, layer.dropout, layer.use_rslora, layer.variant.name, layer.lora_A.dtype]
                for name, layer in lora_layers(self.model).items()
            },
            "base": self._base,
            "machine": arithmetic(self.sources.device),
        }
        # As it is read from a file: tuples are lists there, keys strings.
        as_read: _Identity = json.loads(json.dumps(identity, default=str))
        return as_read

    def _tensors(self) -> dict[str, Tensor]:
        references = {
            f"{name}.{part}": value
            for name, layer in lora_layers(self.model).items()
            for part, value in reference_tensors(layer).items()
        }
        return {**self.trained, **references}

    def write(self, folder: Path) -> None:
        """Writes the state after the last finished step into an empty folder, each file synced to disk."""
        assert self._last is not None
        evaluation = self.last_evaluation()
        random, epoch_random = self._last.random, self._last.position.random
        save_adapter(self.model, folder / ADAPTER_FOLDER)
        states, plain = optimizer_state(self.optimizer, self.trained)
        generators = {NOW + name: value for name, value in random.tensors.items()}
        generators |= {EPOCH + name: value for name, value in epoch_random.tensors.items()}
        files = {TRAINED_FILE: self._tensors(), OPTIMIZER_FILE: states, RANDOM_FILE: generators}
        for file, tensors in files.items():
            write_safetensors(folder / file, {name: planned(value) for name, value in tensors.items()})
        self.write_metrics(folder / METRICS_FILE)
        state: StateFile = {
            "version": VERSION,
            "step": self.steps,
            "mean_loss": self.mean_loss(),
            **self._identity(),
            "checkpointing": self.config.checkpointing,
            "batches": self._last.position.to_json(),
            "random": {"now": dict(random.plain), "epoch": dict(epoch_random.plain)},
            "optimizer": plain,
            "facts": self._last.decisions.to_json(),
            "held_out_loss": None if evaluation is None else evaluation.held_out_loss,
            "exact_match": None if evaluation is None else evaluation.scores.get(EXACT_MATCH),
            "held_out_batches": self.held_out_digest,
        }
        write_json(folder / STATE_FILE, state)

    def write_metrics(self, path: Path) -> None:
        """Writes the lines of all finished steps and evaluations, in place of an existing file."""
        with new_file(path, overwrite=True) as file:
            file.writelines(line.encode() for line in lines_of(self.metrics, self.evaluations))

    def check_same(self, folder: Path) -> None:
        """Raises CheckpointError, with a list of the differences, unless the checkpoint is of a run like this one."""
        stored, own = read_state_file(folder), self._identity()
        settings = {name: stored["settings"].get(name, DEFAULTS.get(name)) for name in own["settings"]}
        problems = _differences("", {**stored["settings"], **settings}, own["settings"])
        problems += _differences("the adapter of ", stored["adapters"], own["adapters"])
        problems += [
            f"the base has other {name}" for name in own["base"] if stored["base"].get(name) != own["base"][name]
        ]
        problems += _differences("machine: ", stored["machine"], own["machine"])
        if problems:
            raise CheckpointError(
                f"{folder} cannot be resumed exactly: {listing(problems, SHOWN, '; ')}; restore these, or go on from "
                f"its adapter in another run: --from-adapter {folder / ADAPTER_FOLDER} (load_adapter_ in Python)"
            )

    def restore_(self, folder: Path) -> None:
        """Gives model, optimizer and batches the state of a checkpoint; `restore_random` does the rest.

        Raises CheckpointError if the checkpoint does not fit.
        """
        stored, tensors = StoredRun.read(folder), self._tensors()
        kinds = [{n: (value.shape, value.dtype) for n, value in side.items()} for side in (stored.trained, tensors)]
        if kinds[0] != kinds[1]:
            other = sorted(name for name in {*stored.trained, *tensors} if kinds[0].get(name) != kinds[1].get(name))
            raise CheckpointError(f"{folder} has other trained tensors than the model: {listing(other, SHOWN)}")
        with torch.no_grad():
            for name, value in tensors.items():
                value.copy_(stored.trained[name])
        load_optimizer_state_(self.optimizer, self.trained, stored.optimizer, stored.state["optimizer"])
        self.stream.skip_to(stored.position)
        self.evaluations, self.held_out_digest = stored.evaluations, stored.state.get("held_out_batches")
        self.metrics, self.decisions = stored.metrics, Decisions.from_json(stored.state["facts"])
        if stored.state["checkpointing"] != self.config.checkpointing:
            self.decisions = replace(self.decisions, block_costs=None)
        self._last = _BetweenSteps(stored.random, self.stream.position(), self.decisions)

    def restore_random(self) -> None:
        """Gives the random numbers the state of the last finished step.

        To be called last before a step, because other code (rich, when it is imported) draws random numbers too.
        """
        if self.sources is not None and self._last is not None:
            self.sources.restore(self._last.random)


def _differences(label: str, stored: Mapping[str, object], own: Mapping[str, object]) -> list[str]:
    return [
        f"{label}{key} was {stored.get(key)!r} and is {own.get(key)!r}"
        for key in sorted({*stored, *own})
        if stored.get(key) != own.get(key)
    ]


def _frozen(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor that training does not change, without those of adapters."""
    of_adapters = {
        id(value)
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
        for value in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
    }
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if id(value) not in of_adapters and not value.requires_grad:
            yield name, value


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    whole = tensor.detach()
    if whole.dim() == 0 or (whole.is_contiguous() and whole.device.type == "cpu"):
        yield raw_bytes(whole)
        return
    for part in whole.split(rows_that_fit(SLICE_BYTES, whole[:1].nbytes)):
        yield raw_bytes(part)


def base_fingerprint(model: nn.Module) -> dict[str, str]:
    """Returns SHA-256 sums of a base: `layout` (names, shapes, dtypes, formats), `values` (all bytes), `config`.

    Packed weights are hashed as they are packed. Hashing takes about a second for 1 to 2 GB. A base in shares has the
    sums of the whole one; all of its processes must call this.
    """
    layout: list[object] = []
    values = hashlib.sha256()
    frozen = list(_frozen(model))
    with working("hashing the base", sum(tensor.nbytes for _, tensor in frozen), BYTES) as work:
        for name, _ in frozen:
            tensor = whole_tensor(model, name)
            layout.append([name, list(tensor.shape), str(tensor.dtype)])
            for piece in _pieces(tensor):
                check_signals()
                values.update(piece)
            release(tensor)
            work.advance(tensor.nbytes)
    for name, module in model.named_modules():
        packing = {attribute: getattr(module, attribute, None) for attribute in PACKING_ATTRIBUTES}
        layout.append([name, type(module).__name__, packing])
    describe = getattr(getattr(model, "config", None), "to_dict", None)
    config = {} if describe is None else {key: value for key, value in describe().items() if key not in ORIGINS}
    return {"layout": json_hash(layout), "values": values.hexdigest(), "config": json_hash(config)}
