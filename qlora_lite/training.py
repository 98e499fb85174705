"""One readable training loop, on accelerate."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn

from qlora_lite import hub
from qlora_lite.adapters import adapter_parameters, add_lora_, freeze_base_, lora_layers
from qlora_lite.checkpointing import Dial, checkpointed
from qlora_lite.config import LoraConfig, QuantConfig, TrainConfig
from qlora_lite.devices import on_cpu
from qlora_lite.errors import ConfigError, NotFiniteError, TargetError, TrainingError
from qlora_lite.lean import lean
from qlora_lite.load import load_quantized
from qlora_lite.memory.host import HoleLimit, keep_freed_pages
from qlora_lite.memory.measure import MemoryProfiler, peak_bytes
from qlora_lite.memory.report import MemoryReport
from qlora_lite.objective import Batch, check_packing, choose_loss, labelled_tokens
from qlora_lite.optim import learning_rate_factor, make_optimizer, set_learning_rates_
from qlora_lite.progress import training_progress
from qlora_lite.residency import holes_limited
from qlora_lite.run_folder import RunFolder, run_folder

FP32_BYTES = 4


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step was: one line of metrics.jsonl. learning_rate: that of A, where they differ."""

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    tokens_per_second: float
    peak_bytes: int | None


@dataclass(frozen=True)
class TrainResult:
    """A finished run: its steps, seconds of the whole, and why the model's own loss was used, if it was."""

    steps: list[StepMetrics]
    seconds: float
    own_loss_because: str | None

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]


def _check_model(model: nn.Module, device: torch.device) -> dict[str, nn.Parameter]:
    adapters = adapter_parameters(model)
    if not adapters:
        raise TargetError("the model has no adapters to train, or none in use; add_lora_ or load_adapter_ puts them in")
    merged = [name for name, layer in model.named_modules() if getattr(layer, "merged", False)]
    if merged:
        raise ConfigError(
            f"{len(merged)} layers are merged, so their adapters would get no gradient; unmerge_lora_ first"
        )
    if off := [name for name, layer in lora_layers(model).items() if not layer.adapter_enabled]:
        raise ConfigError(f"{len(off)} adapters are switched off (adapters_disabled) and would get no gradient")
    frozen = (parameter for parameter in model.parameters() if not parameter.requires_grad)
    if on_cpu(device) and any(parameter.dtype == torch.float16 for parameter in frozen):
        raise ConfigError("the model computes in float16, which a CPU does 10 to 100 times slower; load it as bfloat16")
    halves = [n for n, module in model.named_modules() if getattr(module, "compute_dtype", None) == torch.float16]
    if on_cpu(device) and halves:
        raise ConfigError(
            f"{len(halves)} layers compute in float16, which a CPU does 10 to 100 times slower; "
            f"pack the base with compute_dtype=torch.bfloat16"
        )
    return adapters


def _endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ConfigError("batches is empty")


def _micro_batches(batches: Iterable[Batch], config: TrainConfig) -> Iterator[list[Batch]]:
    """`gradient_accumulation` batches for each step; a sequence or DataLoader starts over when it ends."""
    again = isinstance(batches, (Sequence, torch.utils.data.DataLoader))
    stream = _endless(batches) if again else iter(batches)
    for step in range(config.steps):
        group = list(itertools.islice(stream, config.gradient_accumulation))
        if len(group) < config.gradient_accumulation:
            raise TrainingError(
                f"the batches ended in step {step + 1} of {config.steps}; give more, or train fewer steps"
            )
        yield group


def _check_gradients(adapters: dict[str, nn.Parameter]) -> None:
    missing = [name for name, parameter in adapters.items() if parameter.grad is None]
    if missing:
        shown = ", ".join(missing[:4]) + (" …" if len(missing) > 4 else "")
        raise TrainingError(
            f"{len(missing)} of {len(adapters)} adapter matrices got no gradient in the first step: {shown}"
        )


def _check_batch(batch: Any, vocabulary: int | None) -> None:
    """ConfigError, saying what is wrong, for what is no batch of token rows with labels that this model knows."""
    if not isinstance(batch, dict) or not {"input_ids", "labels"} <= batch.keys():
        got = sorted(batch) if isinstance(batch, dict) else f"a {type(batch).__name__}"
        raise ConfigError(f"a batch must be a dict with tensors input_ids and labels; got {got}")
    ids = batch["input_ids"]
    for name, value in batch.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != len(ids):
            kind = str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(f"{name} of a batch must be a tensor with a row for each of input_ids; got {kind}")
        if name in ("input_ids", "labels") and (value.dim() != 2 or value.dtype != torch.int64):
            raise ConfigError(f"{name} must be int64 of shape (rows, tokens); got {value.dtype} {tuple(value.shape)}")
    if batch["labels"].shape != ids.shape:
        raise ConfigError(
            f"labels must be of the shape of input_ids, {tuple(ids.shape)}; got {tuple(batch['labels'].shape)}"
        )
    low, high = (int(value) for value in ids.aminmax()) if ids.numel() else (0, 0)
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise ConfigError(f"tokens must be in [0, {vocabulary}); got {low if low < 0 else high}")


class _Run:
    """The parts of a run that every step uses."""

    def __init__(self, model: nn.Module, config: TrainConfig, profiler: MemoryProfiler | None) -> None:
        try:
            # The plugin keeps the environment from dividing gradients by an accumulation of its own.
            self.accelerator = Accelerator(gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1))
        except ValueError as error:
            raise ConfigError(f"accelerate refused to start: {str(error).splitlines()[0]}") from error
        if self.accelerator.mixed_precision != "no":
            raise ConfigError(
                f"accelerate is set to mixed precision {self.accelerator.mixed_precision!r} in this process; "
                f"train computes in the model's own dtype: set it to 'no'"
            )
        if self.accelerator.num_processes > 1:
            raise ConfigError(f"train runs in one process; got {self.accelerator.num_processes}")
        self.config, self.profiler = config, profiler
        self.adapters = _check_model(model, self.accelerator.device)
        freeze_base_(model)
        self.vocabulary = hub.vocabulary(model)
        self.close()
        optimizer = make_optimizer(self.adapters, config)
        # `Module.to` cannot exchange fake tensors, and need not be called where there is nothing to move.
        elsewhere = any(tensor.device != self.accelerator.device for tensor in (*model.parameters(), *model.buffers()))
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer, device_placement=[elsewhere, True])
        self.loss: Any = None
        self.own_loss_because: str | None = None
        if profiler is not None:
            profiler.track(self.model, optimizer)

    def close(self) -> None:
        """Nothing of an earlier or a failed backward pass may be added to, or stay behind."""
        for parameter in self.adapters.values():
            parameter.grad = None

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.profiler is None else self.profiler.phase(name)

    def state_bytes(self) -> int:
        """Bytes of the optimizer's states; before the first update, what AdamW's will be at the most."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        known = sum(value.nbytes for value in states if isinstance(value, Tensor))
        return known or sum(2 * FP32_BYTES * parameter.numel() for parameter in self.adapters.values())

    def step(self, number: int, group: list[Batch], dial: Dial, holes: HoleLimit, folder: RunFolder) -> StepMetrics:
        """Forward and backward of each batch, one update. TrainingError before the update if it would spoil it."""
        began = time.perf_counter()
        for batch in group:
            _check_batch(batch, self.vocabulary)
        device = self.accelerator.device
        group = [{name: value.to(device) for name, value in batch.items()} for batch in group]
        counts = [int(labelled_tokens(batch)) for batch in group]
        group = [batch for batch, count in zip(group, counts, strict=True) if count > 0]
        labelled = sum(counts)
        if labelled == 0:
            raise TrainingError(f"no token of step {number} has a label; check the data's completions and truncation")
        if self.loss is None:
            check_packing(self.model, group[0])
            self.loss, self.own_loss_because = choose_loss(self.model, group[0])
        factor = learning_rate_factor(number - 1, self.config)
        set_learning_rates_(self.optimizer, factor)
        total = torch.zeros((), device=self.accelerator.device)
        for batch in group:
            with dial.batch(batch["input_ids"].numel(), self.state_bytes()) as phase:
                holes.phase_ends()
                with self.phase("forward"), phase("forward"):
                    loss = self.loss(self.model, batch) / labelled
                holes.phase_ends()
                with self.phase("backward"), phase("backward"):
                    self.accelerator.backward(loss)
            total += loss.detach()
        if number == 1:
            _check_gradients(self.adapters)
        with self.phase("optimizer"):
            norm = self._update(number, float(total), folder)
        tokens = sum(batch["input_ids"].numel() for batch in group)
        speed = tokens / (time.perf_counter() - began)
        rate = self.config.learning_rate * factor
        return StepMetrics(number, float(total), norm, rate, tokens, speed, peak_bytes(self.accelerator.device))

    def _update(self, number: int, loss: float, folder: RunFolder) -> float:
        limit = self.config.max_grad_norm
        clip = self.accelerator.clip_grad_norm_(self.adapters.values(), float("inf") if limit is None else limit)
        norm = float(clip)
        advice = f"lower the learning rate ({self.config.learning_rate:g}) or check the data"
        for what, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                kept = f"the adapters keep their values of step {number - 1}"
                raise NotFiniteError(f"the {what} of step {number} is {value}; {kept}; {advice}")
        folder.good()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not torch.stack([parameter.isfinite().all() for parameter in self.adapters.values()]).all():
            raise NotFiniteError(f"the update of step {number} made adapters NaN or infinite; {advice}")
        return norm


@contextlib.contextmanager
def _in_training(model: nn.Module) -> Iterator[None]:
    before = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    config: TrainConfig,
    *,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    profiler: MemoryProfiler | None = None,
    progress: bool = True,
) -> TrainResult:
    """Trains the adapters of a model in place, and nothing else.

    batches: dicts of `input_ids` and `labels` `(batch, tokens)`, -100 for no label, and whatever else the model takes.
    The loss is the mean over all labelled tokens of a step, however they are spread over its batches.
    output_dir: gets `metrics.jsonl`, a line a step, and the adapter in `adapter/`, also when training stops early,
        by whatever error; when it diverged, values from before. A folder with something in it is refused unless
        `overwrite`.
    profiler: its phases forward, backward and optimizer are entered.
    Raises NotFiniteError when the loss or the gradients are not finite (before they are applied), or the adapters after
    an update; TrainingError when an adapter gets no gradient in the first step, or the batches end too early;
    ConfigError, TargetError for what cannot be trained. Module modes and forward methods are put back as they were.
    """
    torch.manual_seed(config.seed)
    keep_freed_pages()
    run = _Run(model, config, profiler)
    steps: list[StepMetrics] = []
    began = time.perf_counter()
    with (
        run_folder(model, None if output_dir is None else Path(output_dir), overwrite) as folder,
        _in_training(model),
        lean(model),
        checkpointed(model, config.checkpointing) as dial,
        holes_limited(model, run.accelerator.device, config.checkpointing) as holes,
        training_progress(config.steps, progress) as show,
        contextlib.closing(run),
    ):
        for number, group in enumerate(_micro_batches(batches, config), start=1):
            steps.append(run.step(number, group, dial, holes, folder))
            show(steps[-1])
            folder.note(steps[-1])
    return TrainResult(steps, time.perf_counter() - began, run.own_loss_because)


def check_batch_shape(config: Any, rows: int, tokens: int) -> None:
    """ConfigError for a made-up batch that a model of this config cannot take."""
    for name, value, least in (("rows", rows, 1), ("tokens", tokens, 2)):
        if value < least:
            raise ConfigError(f"{name} must be at least {least}; got {value}")
    longest = hub.longest_sequence(config)
    if longest is not None and tokens > longest:
        raise ConfigError(f"tokens must be at most {longest}, the model's longest sequence; got {tokens}")


def profile_steps(
    model_folder: str | Path,
    quant: QuantConfig,
    lora: LoraConfig,
    config: TrainConfig,
    *,
    rows: int,
    tokens: int,
    profiler: MemoryProfiler | None = None,
) -> MemoryReport:
    """The memory of real training steps on made-up tokens `(rows, tokens)`: phases load, forward, backward, optimizer.

    Two steps at least show the optimizer's states beside the activations of a step. profiler: one that is not open;
    without it every storage is followed.
    """
    check_batch_shape(hub.read_config(hub.resolve(model_folder)), rows, tokens)
    profiler = MemoryProfiler() if profiler is None else profiler
    with profiler:
        with profiler.phase("load"):
            model = load_quantized(model_folder, quant)
            add_lora_(model, lora)
        ids = torch.randint(model.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids, "labels": ids}
        train(model, [batch], config, profiler=profiler, progress=False)
    return profiler.report()
