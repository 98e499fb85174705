"""One step of a training run: the gradients of its batches, in one process or several, and the update.

If memory runs out in a step, the step is made again with each batch split in two, once in a run. The loss is a sum over
rows, so the gradient is the same.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, parse_flag_from_env
from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.checks import are_finite
from qlora_lite.compute.devices import is_out_of_memory, on_cpu
from qlora_lite.compute.host_memory import HeapTrimmer, release_freed_pages
from qlora_lite.compute.random_state import RandomSources, loader_generators
from qlora_lite.data.batching import Batch, lacks_images
from qlora_lite.data.stream import BatchStream, batch_digest
from qlora_lite.errors import ConfigError, NotFiniteError, TargetError, TrainingError
from qlora_lite.lora.adapters import adapter_parameters, freeze_base_, wrapped_layers
from qlora_lite.memory.counters import peak_bytes
from qlora_lite.memory.profiler import MemoryProfiler
from qlora_lite.progress.work import tell
from qlora_lite.sharding.group import Group
from qlora_lite.signals import check_signals
from qlora_lite.tasks import task_of
from qlora_lite.training.config import TrainConfig
from qlora_lite.training.distributed import Pass, Processes
from qlora_lite.training.forward.activation_checkpointing import BlockCheckpointing
from qlora_lite.training.metrics import StepMetrics
from qlora_lite.training.objective.causality import check_causality
from qlora_lite.training.objective.choice import choose_loss, loss_named
from qlora_lite.training.objective.gradients import check_gradients, check_reach
from qlora_lite.training.objective.losses import Loss, refused_inputs
from qlora_lite.training.objective.packing import check_packing, is_packed
from qlora_lite.training.objective.positions import check_positions
from qlora_lite.training.objective.task_losses import labelled, tokens_in
from qlora_lite.training.optim import learning_rate_factor, make_optimizer, set_learning_rates_
from qlora_lite.training.run_state import Run

FP32_BYTES = 4
NOT_BY_ROWS = "similar texts"
# Several processes may have copies of the model, but not parts of it.
ALONE_OR_COPIES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)
# The variables by which `accelerate launch` asks for sharding. On a CPU, accelerate ignores them and would run copies.
SHARDING_VARIABLES = {
    "ACCELERATE_USE_FSDP": DistributedType.FSDP,
    "ACCELERATE_USE_DEEPSPEED": DistributedType.DEEPSPEED,
    "ACCELERATE_USE_MEGATRON_LM": DistributedType.MEGATRON_LM,
}


def _trainable_parameters(model: nn.Module, device: torch.device) -> dict[str, nn.Parameter]:
    """Returns the parameters of the adapters. Raises TargetError or ConfigError if they cannot be trained."""
    adapters = adapter_parameters(model)
    if not adapters:
        raise TargetError(
            "the model has no adapters to train, or none is active; add them with add_lora_ or load_adapter_"
        )
    merged = [name for name, layer in model.named_modules() if getattr(layer, "merged", False)]
    if merged:
        raise ConfigError(
            f"{len(merged)} layers are merged, so their adapters would get no gradient; unmerge_lora_ first"
        )
    if off := [name for name, layer in wrapped_layers(model).items() if not layer.adapter_enabled]:
        raise ConfigError(f"{len(off)} adapters are switched off (adapters_disabled) and would get no gradient")
    frozen = (parameter for parameter in model.parameters() if not parameter.requires_grad)
    if on_cpu(device) and any(parameter.dtype == torch.float16 for parameter in frozen):
        raise ConfigError("the model computes in float16, which a CPU does 10 to 100 times slower; load it as bfloat16")
    in_float16 = [n for n, module in model.named_modules() if getattr(module, "compute_dtype", None) == torch.float16]
    if on_cpu(device) and in_float16:
        raise ConfigError(
            f"{len(in_float16)} layers compute in float16, which a CPU does 10 to 100 times slower; "
            f"pack the base with compute_dtype=torch.bfloat16"
        )
    return adapters


def _check_not_sharded(kind: DistributedType) -> None:
    """Raises ConfigError for modes that shard a model (what they do to packed weights: profiling/sharded_base.py)."""
    if kind not in ALONE_OR_COPIES:
        raise ConfigError(
            f"accelerate is set to {kind.value}, which cannot shard a packed base: its bytes are buffers, and every "
            f"process would hold all of them; set it to data parallel, and load the base with shard (train --shard)"
        )


def start_accelerator(group: Group | None = None) -> Accelerator:
    """Returns accelerate's Accelerator of this process. Raises ConfigError for settings that `train` cannot follow.

    group: the processes that hold the base in shares, if it is; accelerate joins them.
    """
    for variable, kind in SHARDING_VARIABLES.items():
        if parse_flag_from_env(variable):
            _check_not_sharded(kind)
    try:
        # The plugin keeps the environment from dividing gradients by another number of batches.
        plugin, cpu = GradientAccumulationPlugin(num_steps=1), group is not None and on_cpu(group.device)
        accelerator = Accelerator(cpu=cpu, gradient_accumulation_plugin=plugin)
    except ValueError as error:
        raise ConfigError(f"accelerate refused to start: {str(error).splitlines()[0]}") from error
    if accelerator.mixed_precision != "no":
        raise ConfigError(
            f"accelerate is set to mixed precision {accelerator.mixed_precision!r} in this process; "
            f"train computes in the model's own dtype: set it to 'no'"
        )
    _check_not_sharded(accelerator.distributed_type)
    return accelerator


def prepare_run(
    accelerator: Accelerator, model: nn.Module, batches: Iterable[Batch], config: TrainConfig, resumable: bool
) -> Run:
    """Returns a run that has not made a step.

    Moves the model to the accelerator's device, freezes its base, drops old gradients, and gives all processes the
    adapters of the first one. resumable: whether the run is to be saved, which takes a digest of each batch.
    Raises TargetError or ConfigError if the model cannot be trained.
    """
    trained = _trainable_parameters(model, accelerator.device)
    freeze_base_(model)
    sources = RandomSources(accelerator.device, loader_generators(batches)) if resumable else None
    stream = BatchStream(batches, architecture.vocabulary_size(model), sources, task_of(model))
    # `Module.to` cannot replace fake tensors, and is not needed if every tensor is on the device.
    elsewhere = any(tensor.device != accelerator.device for tensor in (*model.parameters(), *model.buffers()))
    run = Run(model, trained, make_optimizer(trained, config), config, stream, sources)
    run.drop_gradients()
    # evaluation_mode: accelerate does not wrap the model, because gradients are summed in distributed.py.
    run.model = accelerator.prepare_model(model, device_placement=elsewhere, evaluation_mode=True)
    run.optimizer = accelerator.prepare_optimizer(run.optimizer)
    processes = Processes.of(accelerator, model)
    processes.agree(lambda: _settings_of(run))
    processes.broadcast_(trained.values())
    if resumable and processes.group is not None:
        run.note_base()  # now, because all processes have to take part
    return run


def _settings_of(run: Run) -> dict[str, str]:
    """Returns what processes must agree on before they train together."""
    adapters = {name: (list(value.shape), str(value.dtype)) for name, value in run.trained.items()}
    return {"set of training settings": str(run.config), "set of adapters": str(adapters)}


class TrainingStep:
    """Makes the steps of a run, one with each call of `make`.

    blocks: the activation checkpointing of the model's blocks. trimmer: returns freed memory to the system.
    profiler: its phases forward, backward and optimizer are entered.
    """

    def __init__(
        self,
        run: Run,
        accelerator: Accelerator,
        blocks: BlockCheckpointing,
        trimmer: HeapTrimmer,
        profiler: MemoryProfiler | None,
    ) -> None:
        self.run, self.processes = run, Processes.of(accelerator, run.model)
        self._accelerator, self._blocks, self._trimmer = accelerator, blocks, trimmer
        self._profiler = profiler
        self._blocks.costs = run.decisions.block_costs
        self._loss: Loss | None = None
        self._where = ""  # the processes whose loss was not finite
        self._rows_checked = 0  # the rows of batches for which packing was checked
        if profiler is not None:
            profiler.track(run.model, run.optimizer)

    @property
    def number(self) -> int:
        """The number of the step that is made next, from 1."""
        return self.run.steps + 1

    def next_batches(self) -> list[Batch]:
        """Returns the batches of the next step, the same in every process."""
        config = self.run.config
        batches = self.run.stream.take(config.gradient_accumulation, self.number, config.steps)
        found = self.processes.call_in_all(functools.partial(list[Batch], batches))
        self.processes.agree(lambda: {f"batch in step {self.number}": functools.reduce(batch_digest, found, "")})
        return found

    def make(self, batches: list[Batch], before_update: Callable[[], None]) -> StepMetrics:
        """Computes the gradients of the batches and updates the trained parameters.

        before_update: called when loss and gradients are known to be finite.
        Raises NotFiniteError before the update if the loss or the gradients are not finite, and after it if the
        parameters are not; TrainingError if no token has a label or memory runs out a second time.
        """
        began = time.perf_counter()
        device, config = self._accelerator.device, self.run.config
        batches = [{name: value.to(device) for name, value in batch.items()} for batch in batches]
        counts = [int(labelled(self.run.model, batch)) for batch in batches]
        batches = [batch for batch, count in zip(batches, counts, strict=True) if count > 0]
        if not batches:
            raise TrainingError(
                f"no token of step {self.number} has a label; check the data's completions and truncation"
            )
        for batch in batches:
            check_positions(self.run.model, batch)
        self._check_packing(batches)
        if self._loss is None:
            self._loss = self.processes.call_in_all(functools.partial(self._checked_loss, batches[0]))
        factor = learning_rate_factor(self.number - 1, config)
        set_learning_rates_(self.run.optimizer, factor)
        loss = self._summed_gradients(batches, sum(counts))
        with self._phase("optimizer"):
            norm = self._update(float(loss), before_update)
        self.run.decisions = replace(self.run.decisions, block_costs=self._blocks.costs)
        tokens = sum(map(tokens_in, batches))
        speed = tokens / (time.perf_counter() - began)
        rate = config.learning_rate * factor
        return StepMetrics(self.number, float(loss), norm, rate, tokens, speed, peak_bytes(device))

    def _phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._profiler is None else self._profiler.phase(name)

    def _checked_loss(self, batch: Batch) -> Loss:
        """Checks the model before the first step of this call of `train`. Returns the loss of the run."""
        model, decisions = self.run.model, self.run.decisions
        check_causality(model, batch)
        name = decisions.loss
        if name is None:
            name, reason = choose_loss(model, batch)
            self.run.decisions = replace(decisions, loss=name, logits_reason=reason)
        loss = loss_named(name)
        if not self.processes.is_alone and not getattr(loss, "by_rows", True):
            raise ConfigError(f"{NOT_BY_ROWS} are trained in one process, since each row is compared with all others")
        check_reach(model, self.run.trained, loss, batch)
        return loss

    def _check_packing(self, batches: list[Batch]) -> None:
        """Checks the model before the first packed batch of this call of `train`, and the first with several rows."""
        packed = max(filter(is_packed, batches), key=lambda batch: len(batch["input_ids"]), default=None)
        if packed is None:
            return
        rows = min(2, math.ceil(len(packed["input_ids"]) / self.processes.count))
        if rows > self._rows_checked:
            self.processes.call_in_all(functools.partial(check_packing, self.run.model, packed, rows))
            self._rows_checked = rows

    def _optimizer_bytes(self) -> int:
        """Returns the bytes of the optimizer's states; before the first update, those that AdamW will have at most."""
        states = [value for state in self.run.optimizer.state.values() for value in state.values()]
        known = sum(value.nbytes for value in states if isinstance(value, Tensor))
        return known or sum(2 * FP32_BYTES * parameter.numel() for parameter in self.run.trained.values())

    def _summed_gradients(self, batches: list[Batch], summands: int) -> Tensor:
        """Returns the loss of the step and leaves its gradients, both summed over all processes."""
        sources = RandomSources(self._accelerator.device)

        def gradients() -> Tensor:
            with self.processes.own_random_numbers(sources, self.run.config.seed, self.number):
                return self._gradients_in_memory(batches, summands)

        loss = self.processes.sum(own := self.processes.call_in_all(gradients))
        self._where = "" if loss.isfinite() else self.processes.without_finite(own)
        self.processes.sum_gradients_(self.run.trained.values())
        return loss

    def _passes(self, batches: list[Batch]) -> list[Pass]:
        """Returns what this process computes of the batches of a step, in halves once memory has run out."""
        halved, count = self.run.decisions.halved_at is not None, functools.partial(labelled, self.run.model)
        # The mean loss of rows without a label is NaN, and their part in the gradient is none.
        return [one for batch in batches for one in self.processes.passes(batch, count, halved)]

    def _gradients_in_memory(self, batches: list[Batch], summands: int) -> Tensor:
        """Returns `_gradients`. If memory runs out, batches are split from here on, and it is called again."""
        try:
            return self._gradients(batches, summands)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if not getattr(self._loss, "by_rows", True):
                raise TrainingError(
                    f"memory ran out in step {self.number}, and batches of {NOT_BY_ROWS} are not divided, since each "
                    f"row is compared with all others; train on shorter rows or smaller batches"
                ) from error
            if self.processes.group is not None:
                raise TrainingError(
                    f"memory ran out in step {self.number}, and with a base in shares batches are not divided, since "
                    f"all processes compute together; train on shorter rows or smaller batches, or recompute more "
                    f"(checkpointing)"
                ) from error
            rows = max(len(batch["input_ids"]) for batch, _ in self._passes(batches))
            if self.run.decisions.halved_at is not None or rows == 1:
                tried = "again, with halved batches" if rows > 1 else "with one row"
                raise TrainingError(
                    f"memory ran out in step {self.number} {tried}; train on shorter rows or smaller batches, or "
                    f"recompute more (checkpointing)"
                ) from error
        self.run.decisions = replace(self.run.decisions, halved_at=self.number)
        tell(
            f"memory ran out in step {self.number}: from here on batches are computed in halves, for the same gradient"
        )
        self.run.drop_gradients()
        release_freed_pages()
        if not on_cpu(self._accelerator.device):
            torch.get_device_module(self._accelerator.device).empty_cache()
        return self._gradients_in_memory(batches, summands)

    def _gradients(self, batches: list[Batch], summands: int) -> Tensor:
        """Runs forward and backward of each batch; returns their part of the loss.

        summands: of the loss (labelled tokens) in all batches of the step, in all processes.
        """
        assert self._loss is not None
        total = torch.zeros((), device=self._accelerator.device)
        check_signals()
        passes = self._passes(batches)
        for batch, factor in passes:
            check_signals()
            with self._blocks.batch(tokens_in(batch), self._optimizer_bytes()) as phase:
                self._trimmer.end_phase()
                with self._phase("forward"), phase("forward"), refused_inputs(self.run.model, batch):
                    loss = self._loss(self.run.model, batch) / summands * factor
                self._trimmer.end_phase()
                check_signals()
                with self._phase("backward"), phase("backward"):
                    self._accelerator.backward(loss)
            total += loss.detach()
        if self.number == 1 and passes:
            check_gradients(self.run.model, self.run.trained, all(lacks_images(batch) for batch, _ in passes))
        return total

    def _update(self, loss: float, before_update: Callable[[], None]) -> float:
        """Clips the gradients and updates the parameters; returns the gradient norm before clipping."""
        config, parameters = self.run.config, self.run.trained.values()
        limit = float("inf") if config.max_grad_norm is None else config.max_grad_norm
        norm = float(self._accelerator.clip_grad_norm_(parameters, limit))
        advice = f"lower the learning rate ({config.learning_rate:g}) or check the data"
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                kept = f"the adapters keep their values of step {self.number - 1}"
                raise NotFiniteError(f"the {name} of step {self.number} is {value}{self._where}; {kept}; {advice}")
        before_update()
        self.run.optimizer.step()
        self.run.optimizer.zero_grad(set_to_none=True)
        if not are_finite(parameters):
            raise NotFiniteError(f"the update of step {self.number} made adapters NaN or infinite; {advice}")
        return norm
