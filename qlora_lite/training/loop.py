"""The training loop, and the memory profile of some steps."""

from __future__ import annotations

import contextlib
import copy
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qlora_lite import architecture
from qlora_lite.checkpoints import hub
from qlora_lite.checkpoints.load import load_quantized
from qlora_lite.checks import require
from qlora_lite.compute.host_memory import heap_trimming, set_host_limits
from qlora_lite.data.batching import Batch
from qlora_lite.errors import ConfigError
from qlora_lite.lora.adapters import add_lora_
from qlora_lite.lora.config import LoraConfig
from qlora_lite.memory.profiler import MemoryProfiler
from qlora_lite.memory.report import MemoryReport
from qlora_lite.positions import longest_sequence
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.signals import check_signals, deferred_signals
from qlora_lite.training.config import TrainConfig
from qlora_lite.training.distributed import Processes
from qlora_lite.training.forward.activation_checkpointing import checkpointed
from qlora_lite.training.forward.embedding_noise import noisy_embeddings
from qlora_lite.training.forward.fuse import unfused
from qlora_lite.training.forward.fused_forward import fused
from qlora_lite.training.objective.choice import checked_loss, loss_named
from qlora_lite.training.objective.positions import check_length, check_positions
from qlora_lite.training.objective.scores import task_scores
from qlora_lite.training.objective.task_losses import check_task_batch, labelled, task_loss
from qlora_lite.training.progress import say, training_progress
from qlora_lite.training.run_checkpoints import StepMetrics
from qlora_lite.training.run_folder import run_folder
from qlora_lite.training.run_state import Run
from qlora_lite.training.step import TrainingStep, prepare_run, start_accelerator

# Rows or tokens of a random batch. No device holds more, and products of sizes stay below 64 bits.
LARGEST_SIDE = 1 << 24


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    steps: the metrics of all its steps, those before it was resumed included. seconds: of this call of `train`.
    logits_reason: why the logits of all tokens were computed; None if the loss was computed without them.
    resumed_from: the checkpoint that this call continued from. skipped: newer checkpoints, and why they were not used.
    halved_at: the step in which memory ran out, from which on batches were computed in halves.
    """

    steps: list[StepMetrics]
    seconds: float
    logits_reason: str | None
    resumed_from: Path | None = None
    skipped: tuple[str, ...] = ()
    halved_at: int | None = None

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]


@contextlib.contextmanager
def _training_mode(run: Run) -> Iterator[None]:
    """Within the block every module is in training mode. At the end, modes are restored and gradients dropped."""
    modes = {module: module.training for module in run.model.modules()}
    run.model.train()
    try:
        yield
    finally:
        run.drop_gradients()
        for module, training in modes.items():
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
    notes: Mapping[str, object] | None = None,
) -> TrainResult:
    """Trains the adapters of a model in place; no other value of the model changes.

    batches: dicts of `input_ids` and `labels`, int64 of shape (batch, tokens), label -100 for tokens that are not
        learned, and whatever else the model takes. The loss is the mean over all labelled tokens of a step.
    output_dir: gets `metrics.jsonl`, one line for each step, and the adapter in `adapter/`, also when training stops
        early by an error; if it diverged, the values before that. With `config.save_steps` it gets `checkpoints/` too.
        A folder with content is refused unless `overwrite`.
    resume: continue from the newest intact checkpoint in output_dir. Model, adapters, batches and config must be made
        as for the run that wrote it. The result is bit for bit that of an uninterrupted run. Without a checkpoint,
        training starts at step 1.
    profiler: its phases forward, backward and optimizer are entered.
    progress: show the progress on stderr.
    notes: what is to be known of the batches later, written to `data.json` in output_dir with the first step.

    SIGINT and SIGTERM take effect between two batches if there is an output_dir: a checkpoint is written and Stopped
    raised. A second SIGINT raises KeyboardInterrupt at once and saves nothing.
    In processes started by `accelerate launch`, each computes its rows of every batch, and the first one writes the
    files. An error or a signal in one stops all. Give all of them the same model, batches and config.
    If memory runs out in a step, that step is made again with its batches split in two, and so are all later ones.
    Module modes and forward methods are restored at the end.

    Raises NotFiniteError if the loss or the gradients are not finite (before the update), or the adapters after an
    update; TrainingError if an adapter gets no gradient in the first step or the batches end too early; ConfigError and
    TargetError if the model or the settings cannot be trained; CheckpointError if output_dir cannot be written or its
    checkpoint belongs to another run.
    """
    if output_dir is None and (resume or config.save_steps is not None):
        raise ConfigError("resume and save_steps need an output_dir, which holds the checkpoints")
    folder = None if output_dir is None else Path(output_dir)
    torch.manual_seed(config.seed)
    set_host_limits()
    accelerator = start_accelerator()
    run = prepare_run(accelerator, model, batches, config, resumable=folder is not None)
    processes = Processes(accelerator)
    shown = progress and processes.is_first
    started = time.perf_counter()
    with (
        unfused(run.model),
        run_folder(run, folder if processes.is_first else None, overwrite, resume, notes) as writer,
        _training_mode(run),
        fused(run.model),
        noisy_embeddings(run.model, config.neftune_noise_alpha),
        checkpointed(run.model, config.checkpointing) as blocks,
        heap_trimming(run.model, accelerator.device, config.checkpointing) as trimmer,
    ):
        if resume and folder is not None:
            processes.wait()  # the first process may still be removing what a killed run left
            say(writer.resume(folder), shown)
            processes.wait()
        step = TrainingStep(run, accelerator, blocks, trimmer, profiler, shown)
        with training_progress(config.steps, shown) as show:
            run.restore_random()
            while run.steps < config.steps:
                metrics = step.make(step.next_batches(), writer.before_update)
                show(metrics)
                writer.finish_step(metrics)
    seconds = time.perf_counter() - started
    reason, halved_at = run.decisions.logits_reason, run.decisions.halved_at
    return TrainResult(run.metrics, seconds, reason, writer.resumed_from, tuple(writer.skipped), halved_at)


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Returns the mean loss over all labelled tokens of some batches, computed as in training, without an update.

    Modes and forward methods of the model are restored.
    Raises ConfigError if no token has a label, if tokens would see later ones or packed examples each other, or if a
    row has more tokens than the model has positions.
    """
    device = next(model.parameters()).device
    total, count, loss = 0.0, 0, None
    with _evaluated(model):
        for batch in batches:
            check_signals()
            batch = {name: value.to(device) for name, value in batch.items()}
            summands = int(labelled(model, batch))
            if summands == 0:
                continue
            check_positions(model, batch)
            if loss is None:
                loss = loss_named(checked_loss(model, batch)[0])
            total, count = total + float(loss(model, batch)), count + summands
    require(count > 0, "held-out batches need a token with a label", "none")
    return total / count


@torch.no_grad()
def held_out_scores(model: nn.Module, batches: Iterable[Batch]) -> dict[str, float | None]:
    """Returns the mean loss over held-out batches, as `held_out_loss`, and the scores of the model's task (scores.py).

    A causal language model has no scores. Raises the errors of `held_out_loss`.
    """
    batches = iter(batches)
    first = next(batches, None)
    require(first is not None, "held-out batches need a token with a label", "none")
    assert first is not None
    of_task, whole = task_loss(model, first), itertools.chain([first], batches)
    if of_task is None:
        return {"loss": held_out_loss(model, whole)}
    check_task_batch(model, first)
    device = next(model.parameters()).device
    with _evaluated(model):
        moved = ({name: value.to(device) for name, value in batch.items()} for batch in whole)
        return task_scores(model, moved, of_task)


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in evaluation mode, with fused functions; modes are restored at the end."""
    set_host_limits()
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with deferred_signals(), unfused(model), fused(model):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def check_batch_shape(config: object, rows: int, tokens: int) -> None:
    """Raises ConfigError if a model of this config cannot take random batches of this shape."""
    for name, value, least in (("rows", rows, 1), ("tokens", tokens, 2)):
        if not least <= value <= LARGEST_SIDE:
            raise ConfigError(f"{name} must be at least {least} and at most {LARGEST_SIDE:,}; got {value}")
    check_length_by_config(config, tokens)


def check_length_by_config(config: object, tokens: int) -> None:
    """Raises ConfigError if a model of this config has a table of positions, with fewer than `tokens`."""
    longest = longest_sequence(config)
    if longest is not None and tokens > longest:
        # Whether there is a table is seen in the model. Building it writes into the config.
        check_length(hub.empty_model(copy.deepcopy(config), torch.bfloat16), tokens)


def profile_steps(
    model_folder: str | Path,
    quant: QuantConfig,
    lora: LoraConfig,
    config: TrainConfig,
    *,
    rows: int,
    tokens: int,
    profiler: MemoryProfiler | None = None,
    text_only: bool = False,
) -> MemoryReport:
    """Returns the memory of training steps on random tokens `(rows, tokens)`.

    The phases are load, forward, backward and optimizer. With at least two steps, the optimizer's states and the
    activations of a step are in memory together.
    profiler: not open yet; without one, every storage is traced. text_only: as in `load_quantized`.
    """
    check_batch_shape(hub.read_config(hub.checkpoint_folder(model_folder)), rows, tokens)
    profiler = MemoryProfiler() if profiler is None else profiler
    with profiler:
        with profiler.phase("load"):
            model = load_quantized(model_folder, quant, text_only=text_only)
            add_lora_(model, lora)
        vocabulary = architecture.vocabulary_size(model) or model.config.vocab_size
        ids = torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids, "labels": ids}
        train(model, [batch], config, profiler=profiler, progress=False)
    return profiler.report()
