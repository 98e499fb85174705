"""One step of a training run: gradients of its batches, in one process or several, and the update.

A step that does not fit into memory is made again with each batch in two halves, once: its loss is a sum over rows, so
the gradient is the same.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from dataclasses import dataclass, fields
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, parse_flag_from_env
from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.compute.devices import is_out_of_memory, on_cpu
from qlora_lite.compute.host_memory import HeapTrimmer, release_freed_pages
from qlora_lite.compute.random_state import RandomSources
from qlora_lite.data.batching import Batch, labelled_tokens
from qlora_lite.errors import CheckpointError, ConfigError, NotFiniteError, TargetError, TrainingError, listing
from qlora_lite.lora.adapters import adapter_parameters, freeze_base_, wrapped_layers
from qlora_lite.memory.counters import peak_bytes
from qlora_lite.memory.profiler import MemoryProfiler
from qlora_lite.signals import check_signals
from qlora_lite.training.activation_checkpointing import Dial
from qlora_lite.training.config import TrainConfig
from qlora_lite.training.distributed import Processes, halves
from qlora_lite.training.objective import check_packing, choose_loss, headless_loss, own_loss
from qlora_lite.training.optim import learning_rate_factor, make_optimizer, set_learning_rates_
from qlora_lite.training.progress import say
from qlora_lite.training.run_folder import RunFolder

FP32_BYTES = 4
ALONE_OR_COPIES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)
# What a launch is asked for in the environment. On a CPU accelerate passes over it, and would run copies.
ASKED_BY = {
    "ACCELERATE_USE_FSDP": DistributedType.FSDP,
    "ACCELERATE_USE_DEEPSPEED": DistributedType.DEEPSPEED,
    "ACCELERATE_USE_MEGATRON_LM": DistributedType.MEGATRON_LM,
}


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

    @classmethod
    def read(cls, line: dict[str, Any]) -> StepMetrics:
        """One that was written as such a line. CheckpointError for a line of something else."""
        if other := line.keys() ^ {field.name for field in fields(cls)}:
            raise CheckpointError(
                f"a line of the run's metrics is no step: {', '.join(sorted(other))} should not differ"
            )
        return cls(**line)


def _check_model(model: nn.Module, device: torch.device) -> dict[str, nn.Parameter]:
    adapters = adapter_parameters(model)
    if not adapters:
        raise TargetError("the model has no adapters to train, or none in use; add_lora_ or load_adapter_ puts them in")
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
    halves = [n for n, module in model.named_modules() if getattr(module, "compute_dtype", None) == torch.float16]
    if on_cpu(device) and halves:
        raise ConfigError(
            f"{len(halves)} layers compute in float16, which a CPU does 10 to 100 times slower; "
            f"pack the base with compute_dtype=torch.bfloat16"
        )
    return adapters


def _check_gradients(adapters: dict[str, nn.Parameter]) -> None:
    missing = [name for name, parameter in adapters.items() if parameter.grad is None]
    if missing:
        shown = listing(missing, 4)
        raise TrainingError(
            f"{len(missing)} of {len(adapters)} adapter matrices got no gradient in the first step: {shown}"
        )


def _check_not_sharded(kind: DistributedType) -> None:
    """ConfigError for what cuts a model to pieces (profiling/sharded_base.py shows what becomes of a packed one)."""
    if kind not in ALONE_OR_COPIES:
        raise ConfigError(
            f"accelerate is set to {kind.value}, which is not for a packed base: its bytes are buffers, which sharding "
            f"leaves whole in each process; set it to data parallel"
        )


class Run:
    """The parts of a run that every step uses."""

    def __init__(
        self, model: nn.Module, config: TrainConfig, profiler: MemoryProfiler | None, progress: bool = False
    ) -> None:
        for variable, kind in ASKED_BY.items():
            if parse_flag_from_env(variable):
                _check_not_sharded(kind)
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
        _check_not_sharded(self.accelerator.distributed_type)
        self.config, self.profiler = config, profiler
        self.adapters = _check_model(model, self.accelerator.device)
        freeze_base_(model)
        self.vocabulary = architecture.vocabulary_size(model)
        self.close()
        optimizer = make_optimizer(self.adapters, config)
        # `Module.to` cannot exchange fake tensors, and need not be called where there is nothing to move.
        elsewhere = any(tensor.device != self.accelerator.device for tensor in (*model.parameters(), *model.buffers()))
        # evaluation_mode: nothing is wrapped around the model; gradients are summed here (distributed.py).
        self.model = self.accelerator.prepare_model(model, device_placement=elsewhere, evaluation_mode=True)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.processes = Processes(self.accelerator)
        self.processes.same_start_(self.adapters.values())
        self.progress = progress and self.processes.writes
        self.halved_at: int | None = None
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

    def facts(self, dial: Dial) -> dict[str, Any]:
        """What the steps after the first do as that one showed."""
        return {"own_loss_because": self.own_loss_because, "dial": dial.measured, "halved_at": self.halved_at}

    def go_on(self, facts: dict[str, Any], dial: Dial) -> None:
        """Does as the first step of the run before showed."""
        self.own_loss_because, dial.measured = facts["own_loss_because"], facts["dial"]
        self.halved_at = facts["halved_at"]
        self.loss = headless_loss if self.own_loss_because is None else own_loss

    def step(self, number: int, group: list[Batch], dial: Dial, trimmer: HeapTrimmer, folder: RunFolder) -> StepMetrics:
        """Forward and backward of each batch, one update. TrainingError before the update if it would spoil it."""
        began = time.perf_counter()
        device = self.accelerator.device
        group = [{name: value.to(device) for name, value in batch.items()} for batch in group]
        counts = [int(labelled_tokens(batch)) for batch in group]
        group = [batch for batch, count in zip(group, counts, strict=True) if count > 0]
        labelled = sum(counts)
        if labelled == 0:
            raise TrainingError(f"no token of step {number} has a label; check the data's completions and truncation")
        if self.loss is None:
            self.loss, self.own_loss_because = self.processes.together(functools.partial(self._chosen_loss, group[0]))
        factor = learning_rate_factor(number - 1, self.config)
        set_learning_rates_(self.optimizer, factor)
        total = self._summed(number, group, labelled, dial, trimmer)
        with self.phase("optimizer"):
            norm = self._update(number, float(total), folder)
        tokens = sum(batch["input_ids"].numel() for batch in group)
        speed = tokens / (time.perf_counter() - began)
        rate = self.config.learning_rate * factor
        return StepMetrics(number, float(total), norm, rate, tokens, speed, peak_bytes(self.accelerator.device))

    def _chosen_loss(self, batch: Batch) -> Any:
        """The loss for batches such as this first one, tried on it, and why it is the model's own."""
        check_packing(self.model, batch)
        check_signals()
        return choose_loss(self.model, batch)

    def _summed(self, number: int, group: list[Batch], labelled: int, dial: Dial, trimmer: HeapTrimmer) -> Tensor:
        """The loss of a step, and its gradients, over all processes. What goes wrong in one stops all of them."""
        mine = [rows for batch in group if (rows := self.processes.rows(batch)) is not None]

        def gradients() -> Tensor:
            with self.processes.own_random_numbers(RandomSources(self.accelerator.device), self.config.seed, number):
                return self._fitting(number, mine, labelled, dial, trimmer)

        total = self.processes.sum(self.processes.together(gradients))
        self.processes.sum_gradients_(self.adapters.values())
        return total

    def _fitting(self, number: int, group: list[Batch], labelled: int, dial: Dial, trimmer: HeapTrimmer) -> Tensor:
        """As `_gradients`; if memory runs out, in halves, from here on."""
        try:
            return self._gradients(number, group, labelled, dial, trimmer)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            rows = max(len(batch["input_ids"]) for batch in group)
            if self.halved_at is not None or rows == 1:
                tried = "again, with halved batches" if rows > 1 else "with one row"
                raise TrainingError(
                    f"memory ran out in step {number} {tried}; train on shorter rows or smaller batches, or recompute "
                    f"more (checkpointing)"
                ) from error
        self.halved_at = number
        say(
            f"memory ran out in step {number}: from here on batches are computed in halves, for the same gradient",
            self.progress,
        )
        self.close()
        release_freed_pages()
        if not on_cpu(self.accelerator.device):
            torch.get_device_module(self.accelerator.device).empty_cache()
        return self._fitting(number, group, labelled, dial, trimmer)

    def _gradients(self, number: int, group: list[Batch], labelled: int, dial: Dial, trimmer: HeapTrimmer) -> Tensor:
        """Forward and backward of each of these batches; what they add to the loss."""
        total = torch.zeros((), device=self.accelerator.device)
        check_signals()
        for batch in group if self.halved_at is None else itertools.chain.from_iterable(map(halves, group)):
            check_signals()
            with dial.batch(batch["input_ids"].numel(), self.state_bytes()) as phase:
                trimmer.end_phase()
                with self.phase("forward"), phase("forward"):
                    loss = self.loss(self.model, batch) / labelled
                trimmer.end_phase()
                check_signals()
                with self.phase("backward"), phase("backward"):
                    self.accelerator.backward(loss)
            total += loss.detach()
        if number == 1 and group:
            _check_gradients(self.adapters)
        return total

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
