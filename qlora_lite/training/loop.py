"""One readable training loop, on accelerate."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_lite import architecture
from qlora_lite.checkpoints import hub
from qlora_lite.checkpoints.load import load_quantized
from qlora_lite.compute.host_memory import heap_trimming, set_host_limits
from qlora_lite.compute.random_state import RandomSources, loader_generators
from qlora_lite.data.batching import Batch
from qlora_lite.data.stream import BatchStream
from qlora_lite.errors import ConfigError
from qlora_lite.lora.adapters import add_lora_
from qlora_lite.lora.config import LoraConfig
from qlora_lite.memory.profiler import MemoryProfiler
from qlora_lite.memory.report import MemoryReport
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.training.activation_checkpointing import checkpointed
from qlora_lite.training.config import TrainConfig
from qlora_lite.training.fused_forward import lean
from qlora_lite.training.progress import say, training_progress
from qlora_lite.training.run_folder import run_folder
from qlora_lite.training.run_state import RunState
from qlora_lite.training.step import Run, StepMetrics

# Rows or tokens of a made-up batch: no device holds more, and products of sizes stay within 64 bits.
LARGEST_SIDE = 1 << 24


@dataclass(frozen=True)
class TrainResult:
    """A finished run: its steps, seconds of this call, and why the model's own loss was used, if it was.

    resumed_from: the checkpoint that it went on from, whose steps are in `steps` too; skipped: newer ones, and why.
    halved_at: the step in which memory ran out, from which on batches were computed in halves.
    """

    steps: list[StepMetrics]
    seconds: float
    own_loss_because: str | None
    resumed_from: Path | None = None
    skipped: tuple[str, ...] = ()
    halved_at: int | None = None

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]


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
    resume: bool = False,
    profiler: MemoryProfiler | None = None,
    progress: bool = True,
) -> TrainResult:
    """Trains the adapters of a model in place, and nothing else.

    batches: dicts of `input_ids` and `labels` `(batch, tokens)`, -100 for no label, and whatever else the model takes.
    The loss is the mean over all labelled tokens of a step, however they are spread over its batches.
    output_dir: gets `metrics.jsonl`, a line a step, and the adapter in `adapter/`, also when training stops early,
        by whatever error; when it diverged, values from before. A folder with something in it is refused unless
        `overwrite`. With `config.save_steps` also `checkpoints/`.
    resume: go on from the newest sound checkpoint in output_dir, with model, adapters, batches and config made as for
        the run that wrote it; what follows is bit for bit what that run would have done. CheckpointError for whatever
        is not the same; without a checkpoint, training starts at step 1.
    SIGINT and SIGTERM are obeyed between two batches, if there is an output_dir: a checkpoint is written, and Stopped
    raised. A second SIGINT is a KeyboardInterrupt at once, and saves nothing.
    In processes started by `accelerate launch` each takes its rows of every batch, the first one writes the files, and
    an error or a signal in one stops all; give all of them the same model, batches and config.
    A step that memory runs out in is made again with its batches in halves, and so are those after it; once.
    profiler: its phases forward, backward and optimizer are entered.
    Raises NotFiniteError when the loss or the gradients are not finite (before they are applied), or the adapters after
    an update; TrainingError when an adapter gets no gradient in the first step, or the batches end too early;
    ConfigError, TargetError for what cannot be trained. Module modes and forward methods are put back as they were.
    """
    if output_dir is None and (resume or config.save_steps is not None):
        raise ConfigError("resume and save_steps need an output_dir, where the checkpoints are")
    torch.manual_seed(config.seed)
    set_host_limits()
    run = Run(model, config, profiler, progress)
    device = run.accelerator.device
    sources = None if output_dir is None else RandomSources(device, loader_generators(batches))
    stream = BatchStream(batches, run.vocabulary, sources)
    state = None if sources is None else RunState(model, run.adapters, run.optimizer, config, stream, sources)
    place = None if output_dir is None else Path(output_dir)
    began = time.perf_counter()
    with (
        run_folder(model, place if run.processes.writes else None, overwrite, resume, state) as folder,
        _in_training(model),
        lean(model),
        checkpointed(model, config.checkpointing) as dial,
        heap_trimming(model, device, config.checkpointing) as trimmer,
        contextlib.closing(run),
    ):
        if resume and state is not None and place is not None:
            run.processes.wait()  # the first one may still be removing what a killed run left
            say(folder.resumed(place, state), run.progress)
            run.processes.wait()
        steps = [] if state is None else [StepMetrics.read(line) for line in state.metrics]
        with training_progress(config.steps, run.progress) as show:
            if state is not None and steps:
                run.go_on(state.facts, dial)
                state.restore_random()
            for number in range(len(steps) + 1, config.steps + 1):
                batches_of_step = stream.group(config.gradient_accumulation, number, config.steps)
                group = run.processes.together(functools.partial(list[Batch], batches_of_step))
                steps.append(run.step(number, group, dial, trimmer, folder))
                show(steps[-1])
                folder.note(steps[-1], run.facts(dial))
    seconds = time.perf_counter() - began
    return TrainResult(steps, seconds, run.own_loss_because, folder.resumed_from, tuple(folder.skipped), run.halved_at)


def check_batch_shape(config: Any, rows: int, tokens: int) -> None:
    """ConfigError for a made-up batch that a model of this config cannot take."""
    for name, value, least in (("rows", rows, 1), ("tokens", tokens, 2)):
        if not least <= value <= LARGEST_SIDE:
            raise ConfigError(f"{name} must be at least {least} and at most {LARGEST_SIDE:,}; got {value}")
    longest = architecture.longest_sequence(config)
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
    check_batch_shape(hub.read_config(hub.checkpoint_folder(model_folder)), rows, tokens)
    profiler = MemoryProfiler() if profiler is None else profiler
    with profiler:
        with profiler.phase("load"):
            model = load_quantized(model_folder, quant)
            add_lora_(model, lora)
        ids = torch.randint(model.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids, "labels": ids}
        train(model, [batch], config, profiler=profiler, progress=False)
    return profiler.report()
