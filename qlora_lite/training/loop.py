"""The training loop, and the memory profile of some steps."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from qlora_lite import architecture
from qlora_lite.checkpoints import hub
from qlora_lite.checkpoints.load import load_quantized
from qlora_lite.choices import Choices, choices_in_force
from qlora_lite.choosing.machine_table import device_choices
from qlora_lite.compute.devices import model_dtype
from qlora_lite.compute.host_memory import heap_trimming, set_host_limits
from qlora_lite.data.batching import Batch
from qlora_lite.errors import ConfigError
from qlora_lite.lora.adapters import add_lora_
from qlora_lite.lora.config import LoraConfig
from qlora_lite.memory.profiler import MemoryProfiler
from qlora_lite.memory.report import MemoryReport
from qlora_lite.positions import longest_sequence
from qlora_lite.progress.work import progress_shown, tell, working
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.sharding.base import ends_told, sharded_base
from qlora_lite.surgery import modes_restored
from qlora_lite.training.config import LOSS, TrainConfig
from qlora_lite.training.distributed import Processes
from qlora_lite.training.evaluation import Evaluate, Evaluator
from qlora_lite.training.forward.activation_checkpointing import checkpointed
from qlora_lite.training.forward.embedding_noise import noisy_embeddings
from qlora_lite.training.forward.fuse import unfused
from qlora_lite.training.forward.fused_forward import fused
from qlora_lite.training.metrics import Evaluation, StepMetrics, best_evaluation, described, described_evaluation
from qlora_lite.training.objective.positions import check_length
from qlora_lite.training.observers import RunObserver
from qlora_lite.training.run_folder import RunFolder, run_folder
from qlora_lite.training.run_state import Run
from qlora_lite.training.step import TrainingStep, prepare_run, start_accelerator

# Rows or tokens of a random batch. No device holds more, and products of sizes stay below 64 bits.
LARGEST_SIDE = 1 << 24
LINES = 10  # of the progress of a run, where stderr is not a terminal


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    steps: the metrics of all its steps, those before it was resumed included. seconds: of this call of `train`.
    logits_reason: why the logits of all tokens were computed; None if the loss was computed without them.
    resumed_from: the checkpoint that this call continued from. skipped: newer checkpoints, and why they were not used.
    halved_at: the step in which memory ran out, from which on batches were computed in halves.
    evaluations: of the held-out batches. stopped_early: whether `patience` ended the run. best_by: as in TrainConfig.
    choices: the alternatives of equal computations (choices.py).
    """

    steps: list[StepMetrics]
    seconds: float
    logits_reason: str | None
    resumed_from: Path | None = None
    skipped: tuple[str, ...] = ()
    halved_at: int | None = None
    evaluations: tuple[Evaluation, ...] = ()
    stopped_early: bool = False
    choices: Choices = field(default_factory=dict)
    best_by: str = LOSS

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]

    @property
    def best(self) -> Evaluation | None:
        """The best evaluation, that before the first step left out; None without any."""
        return best_evaluation(self.evaluations, self.best_by)


@contextlib.contextmanager
def _training_mode(run: Run) -> Iterator[None]:
    """Within the block every module is in training mode. At the end, modes are restored and gradients dropped."""
    with modes_restored(run.model):
        run.model.train()
        try:
            yield
        finally:
            run.drop_gradients()


@contextlib.contextmanager
def _chosen_alternatives(run: Run, processes: Processes, device: torch.device) -> Iterator[None]:
    """Within the block the alternatives of the run are in force: those of a resumed run, else of the first process."""
    dtype = model_dtype(run.model)
    choices = run.decisions.choices or processes.first_choices(lambda: device_choices(device, dtype))
    run.decisions = replace(run.decisions, choices=choices)
    with choices_in_force(choices):
        yield


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    config: TrainConfig,
    *,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    eval_batches: Iterable[Batch] | None = None,
    evaluate: Evaluate | None = None,
    profiler: MemoryProfiler | None = None,
    progress: bool = True,
    notes: Mapping[str, object] | None = None,
    settings: str | None = None,
    observers: Sequence[RunObserver] = (),
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
    eval_batches: held-out batches, the same each time that they are iterated over. Their loss is computed before the
        first step, every `config.eval_steps` steps and after the last one, and goes to `metrics.jsonl`. With
        `eval_steps`, output_dir gets the adapter of the best one in `best_adapter/` (`config.best_by`).
    evaluate: called with the model in evaluation mode at each evaluation; returns more scores of it by name, which
        go to `metrics.jsonl` too.
    profiler: its phases forward, backward, optimizer and evaluation are entered.
    progress: show the progress on stderr.
    notes: what is to be known of the batches later, written to `data.json` in output_dir with the first step.
    settings: what the run was asked to do, as text; written to `run.yaml` in the same way.
    observers: are told of each step and evaluation, as trackers are (`integrations.open_trackers`).

    SIGINT and SIGTERM take effect between two batches if there is an output_dir: a checkpoint is written and Stopped
    raised. A second SIGINT raises KeyboardInterrupt at once and saves nothing.
    In processes started by `accelerate launch`, each computes its rows of every batch, and the first one writes the
    files. An error or a signal in one stops all. Give all of them the same model, batches and config; those that hold
    the base in shares (`load_quantized(..., shard=True)`) compare them, and raise LostProcess if one is lost.
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
    base = sharded_base(model)
    with ends_told(model):
        accelerator = start_accelerator(None if base is None else base.group)
        run = prepare_run(accelerator, model, batches, config, resumable=folder is not None)
        processes = Processes.of(accelerator, model)
        evaluator = Evaluator(run, processes, eval_batches, evaluate, profiler)
        written, told = (folder, observers) if processes.is_first else (None, ())
        started = time.perf_counter()
        with (
            progress_shown(progress and processes.is_first),
            unfused(run.model),
            run_folder(run, written, overwrite, resume, notes, settings, told) as writer,
            _training_mode(run),
            fused(run.model),
            noisy_embeddings(run.model, config.neftune_noise_alpha),
            checkpointed(run.model, config.checkpointing) as blocks,
            heap_trimming(run.model, accelerator.device, config.checkpointing) as trimmer,
        ):
            if resume and folder is not None:
                processes.wait()  # the first process may still be removing what a killed run left
                tell(writer.resume(folder))
                processes.wait()
                evaluator.check_same_batches()
            with _chosen_alternatives(run, processes, accelerator.device):
                step = TrainingStep(run, accelerator, blocks, trimmer, profiler)
                stopped_early = _steps(step, writer, evaluator)
    seconds, found = time.perf_counter() - started, run.decisions
    return TrainResult(
        run.metrics,
        seconds,
        found.logits_reason,
        writer.resumed_from,
        tuple(writer.skipped),
        found.halved_at,
        tuple(run.evaluations),
        stopped_early,
        found.choices or {},
        config.best_by,
    )


@contextlib.contextmanager
def _progress(steps: int) -> Iterator[Callable[[StepMetrics], None]]:
    """Yields a function that shows a step: in a bar, or as one of ten lines where stderr is not a terminal."""
    with working("training", steps, has_line=False) as work:
        every = max(1, steps // LINES)

        def show(step: StepMetrics) -> None:
            work.reach(step.step, described(step))
            is_last = step.step == steps
            if is_last or (not work.has_bar and (step.step % every == 0 or step.step == 1)):
                tell(f"step {step.step}/{steps}  {described(step)}")

        yield show


def _steps(step: TrainingStep, writer: RunFolder, evaluator: Evaluator) -> bool:
    """Makes the steps that are left of a run, with its evaluations. Returns whether the run ended early."""
    run, config = step.run, step.run.config
    with _progress(config.steps) as show:
        run.restore_random()
        while True:
            if evaluator.is_due:
                evaluation = evaluator.make()
                writer.finish_evaluation(evaluation)
                tell(described_evaluation(evaluation, config.steps))
            stops_early = evaluator.is_out_of_patience and run.steps < config.steps
            writer.write_due_checkpoint(stops_early or run.steps == config.steps)
            if stops_early:
                what = "held-out loss did not fall" if config.best_by == LOSS else "exact match did not rise"
                waited = f"the {what} in {config.patience} evaluations"
                tell(f"{waited}: the run ends after step {run.steps}")
            if stops_early or run.steps == config.steps:
                return stops_early
            metrics = step.make(step.next_batches(), writer.before_update)
            show(metrics)
            writer.finish_step(metrics)


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
    ignore_unexpected: bool = False,
) -> MemoryReport:
    """Returns the memory of training steps on random tokens `(rows, tokens)`.

    The phases are load, forward, backward and optimizer. With at least two steps, the optimizer's states and the
    activations of a step are in memory together. Nothing is evaluated or saved.
    profiler: not open yet; without one, every storage is traced. text_only, ignore_unexpected: as in `load_quantized`.
    """
    check_batch_shape(hub.read_config(hub.checkpoint_folder(model_folder)), rows, tokens)
    profiler = MemoryProfiler() if profiler is None else profiler
    with profiler:
        with profiler.phase("load"):
            model = load_quantized(model_folder, quant, text_only=text_only, ignore_unexpected=ignore_unexpected)
            add_lora_(model, lora)
        for line in model.load_report.in_words():
            tell(line)
        vocabulary = architecture.vocabulary_size(model) or model.config.vocab_size
        ids = torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids, "labels": ids}
        train(model, [batch], config.steps_alone(), profiler=profiler, progress=False)
    return profiler.report()
