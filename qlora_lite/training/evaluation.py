"""Held-out batches: their loss and the scores of a model's task, by themselves and during training.

The loss is that of training, a mean over all labelled tokens, computed without the logits where training does so, and
without anything for a backward. So an evaluation of batches of the shape that is trained on takes less memory than a
step. Modes and random numbers are afterwards as before: a run ends with the same bits with evaluations and without.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import nn

from qlora_lite import architecture
from qlora_lite.checks import is_finite, require
from qlora_lite.compute.devices import is_out_of_memory
from qlora_lite.compute.host_memory import set_host_limits
from qlora_lite.compute.random_state import RandomSources
from qlora_lite.data.batching import Batch
from qlora_lite.data.stream import batch_digest, check_batch
from qlora_lite.errors import CheckpointError, ConfigError, NotFiniteError
from qlora_lite.memory.profiler import MemoryProfiler
from qlora_lite.progress.work import working
from qlora_lite.sharding.base import sharded_base
from qlora_lite.signals import check_signals, deferred_signals
from qlora_lite.surgery import modes_restored
from qlora_lite.tasks import task_of
from qlora_lite.training.config import EXACT_MATCH
from qlora_lite.training.distributed import Pass, Processes, split_in_two
from qlora_lite.training.forward.fuse import unfused
from qlora_lite.training.forward.fused_forward import fused
from qlora_lite.training.metrics import OWN_KEYS, Evaluation, is_out_of_patience, perplexity
from qlora_lite.training.objective.choice import check_sight, checked_loss, choose_loss, loss_named
from qlora_lite.training.objective.losses import Loss
from qlora_lite.training.objective.positions import check_positions
from qlora_lite.training.objective.scores import task_scores
from qlora_lite.training.objective.task_losses import TaskLoss, check_task_batch, labelled, task_loss
from qlora_lite.training.run_state import Run

Scores = dict[str, float | None]
# Computes more scores of a model, which is in evaluation mode.
Evaluate = Callable[[nn.Module], Mapping[str, float | None]]

NO_LABELS = "held-out batches need a token with a label"


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within the block every module is in evaluation mode; modes are restored at the end."""
    with modes_restored(model):
        model.eval()
        yield


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in evaluation mode, with fused functions."""
    set_host_limits()
    with evaluation_mode(model), deferred_signals(), unfused(model), fused(model):
        yield


def _on_device(model: nn.Module, batch: Batch) -> Batch:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}


def _summed_loss(
    model: nn.Module,
    batches: Iterable[Batch],
    choose: Callable[[Batch], Loss],
    passes: Callable[[Batch], list[Pass]] = lambda batch: [(batch, 1.0)],
) -> tuple[float, int]:
    """Returns the summed loss of rows of some batches, and the labelled tokens of all rows.

    choose: returns the loss, called with the first batch that has a labelled token. passes: the rows to compute.
    """
    total, count, loss = 0.0, 0, None
    for batch in batches:
        check_signals()
        batch = _on_device(model, batch)
        summands = int(labelled(model, batch))
        if summands == 0:
            continue
        check_positions(model, batch)
        loss = choose(batch) if loss is None else loss
        total += sum(factor * _in_memory(model, loss, rows) for rows, factor in passes(batch))
        count += summands
    return total, count


def _in_memory(model: nn.Module, loss: Loss, batch: Batch) -> float:
    """Returns the summed loss of a batch. If memory runs out, it is computed in halves, if the base is whole."""
    if int(labelled(model, batch)) == 0:  # the mean loss of such rows is NaN
        return 0.0
    try:
        return float(loss(model, batch))
    except Exception as error:
        if not is_out_of_memory(error) or len(batch["input_ids"]) == 1 or sharded_base(model) is not None:
            raise
    return sum(_in_memory(model, loss, half) for half in split_in_two(batch))


def _with_task(model: nn.Module, batches: Iterable[Batch]) -> tuple[TaskLoss | None, Iterator[Batch]]:
    """Returns the loss of the model's task, None for a causal language model, and the batches.

    Raises ConfigError if there is no batch, or if the first one does not suit the task.
    """
    batches = iter(batches)
    first = next(batches, None)
    require(first is not None, NO_LABELS, "none")
    assert first is not None
    of_task = task_loss(model, first)
    if of_task is not None:
        check_task_batch(model, first)
    return of_task, itertools.chain([first], batches)


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Returns the mean loss over all labelled tokens of some batches, computed as in training, without an update.

    Modes and forward methods of the model are restored.
    Raises ConfigError if no token has a label, if tokens would see later ones or packed examples each other, or if a
    row has more tokens than the model has positions.
    """
    with _evaluated(model):
        total, count = _summed_loss(model, batches, lambda batch: loss_named(checked_loss(model, batch)[0]))
    require(count > 0, NO_LABELS, "none")
    return total / count


@torch.no_grad()
def held_out_scores(model: nn.Module, batches: Iterable[Batch]) -> Scores:
    """Returns the mean loss over held-out batches, as `held_out_loss`, and the scores of the model's task (scores.py).

    A causal language model has no scores. Raises the errors of `held_out_loss`.
    """
    of_task, whole = _with_task(model, batches)
    if of_task is None:
        return {"loss": held_out_loss(model, whole)}
    with _evaluated(model):
        return task_scores(model, (_on_device(model, batch) for batch in whole), of_task)


class Evaluator:
    """Evaluates a run on held-out batches, before its first step, every `eval_steps` steps, and at its end.

    batches: gives the same batches each time that it is iterated over; None evaluates nothing. evaluate: returns more
    scores of the model. profiler: its phase evaluation is entered.
    Raises ConfigError for settings that need batches, and for batches that can be iterated over once only.
    """

    def __init__(
        self,
        run: Run,
        processes: Processes,
        batches: Iterable[Batch] | None,
        evaluate: Evaluate | None,
        profiler: MemoryProfiler | None,
    ) -> None:
        self.run, self._processes = run, processes
        self._batches, self._evaluate, self._profiler = batches, evaluate, profiler
        self._number: int | None = len(batches) if isinstance(batches, Sized) else None  # of batches
        if batches is None and (run.config.eval_steps is not None or evaluate is not None):
            named = "evaluate" if run.config.eval_steps is None else "eval_steps"
            raise ConfigError(f"{named} needs held-out batches; give eval_batches")
        if evaluate is None and run.config.best_by == EXACT_MATCH:
            raise ConfigError(
                "best_by 'exact_match' needs answers that the model writes; give --eval-generate (evaluate in Python)"
            )
        if batches is not None and iter(batches) is batches:
            raise ConfigError("eval_batches is an iterator, which gives its batches once; give a list or a DataLoader")

    @property
    def is_due(self) -> bool:
        """Whether an evaluation comes next: after the last finished step, or before the first."""
        steps, config = self.run.steps, self.run.config
        if self._batches is None or any(evaluation.step == steps for evaluation in self.run.evaluations):
            return False
        return steps in (0, config.steps) or (config.eval_steps is not None and steps % config.eval_steps == 0)

    @property
    def is_out_of_patience(self) -> bool:
        """Whether the run stops early."""
        return is_out_of_patience(self.run.evaluations, self.run.config.patience, self.run.config.best_by)

    def check_same_batches(self) -> None:
        """Raises CheckpointError unless the held-out batches are those of the run that is resumed."""
        stored = self.run.held_out_digest
        if stored is None:
            return
        for _ in self._checked_batches() if self._batches is not None else ():
            pass
        if self._batches is None or self.run.held_out_digest != stored:
            raise CheckpointError("the held-out batches are not those of the run; give the same eval_batches")

    def _checked_batches(self) -> Iterator[Batch]:
        """Yields the held-out batches. Afterwards `held_out_digest` of the run is theirs."""
        assert self._batches is not None
        vocabulary, digest = architecture.vocabulary_size(self.run.model), ""
        with working("evaluating", self._number, "batches") as work:
            for batch in self._batches:
                check_signals()
                check_batch(batch, vocabulary, task_of(self.run.model))
                digest = digest if self.run.sources is None else batch_digest(digest, batch)
                yield batch
                work.advance()
        self._number = work.done
        self.run.held_out_digest = digest or None

    def make(self) -> Evaluation:
        """Returns the evaluation of the model as it is; run.finish_evaluation notes it.

        Raises NotFiniteError for a loss that is not finite, and ConfigError for batches that are others than before.
        """
        run, began = self.run, time.perf_counter()
        before, sources = run.held_out_digest, run.sources or RandomSources(next(run.model.parameters()).device)
        random = sources.capture()
        phase = nullcontext() if self._profiler is None else self._profiler.phase("evaluation")
        try:
            with evaluation_mode(run.model), torch.no_grad(), phase:
                loss, scores = self._held_out()
                scores |= self._scores_of_user(scores)
        finally:
            sources.restore(random)
        if not math.isfinite(loss):
            raise NotFiniteError(f"the held-out loss after step {run.steps} is {loss}; lower the learning rate")
        if before is not None and run.held_out_digest != before:
            raise ConfigError("eval_batches gave other batches than in the evaluation before; give the same each time")
        return Evaluation(run.steps, loss, scores, round(time.perf_counter() - began, 3))

    def _held_out(self) -> tuple[float, Scores]:
        """Returns the mean loss of the held-out batches, the same in all processes, and the scores of the task."""
        model, processes, device = self.run.model, self._processes, next(self.run.model.parameters()).device
        of_task, whole = _with_task(model, self._checked_batches())
        if of_task is None:
            passes = functools.partial(processes.passes, labelled=functools.partial(labelled, model))
            summed = functools.partial(_summed_loss, model, whole, self._chosen_loss, passes)
            total, count = processes.call_in_all(summed)
            require(count > 0, NO_LABELS, "none")
            loss = float(processes.sum(torch.tensor(total, dtype=torch.float64, device=device))) / count
            return loss, {"perplexity": perplexity(loss)} if math.isfinite(loss) else {}
        moved = (_on_device(model, batch) for batch in whole)
        scores = processes.call_in_all(functools.partial(task_scores, model, moved, of_task))
        own = scores.pop("loss") or 0.0
        return float(processes.sum(torch.tensor(own * processes.is_first, dtype=torch.float64, device=device))), scores

    def _chosen_loss(self, batch: Batch) -> Loss:
        """Returns the loss that the run is trained with, and chooses it if there was no step; tries the model before.

        Raises ConfigError if tokens would see later ones or packed examples each other.
        """
        run = self.run
        check_sight(run.model, batch)
        if run.decisions.loss is None:
            name, reason = choose_loss(run.model, batch)
            run.decisions = replace(run.decisions, loss=name, logits_reason=reason)
        assert run.decisions.loss is not None
        return loss_named(run.decisions.loss)

    def _scores_of_user(self, known: Scores) -> Scores:
        if self._evaluate is None:
            return {}
        found = dict(self._processes.call_in_all(functools.partial(self._evaluate, self.run.model)))
        if taken := sorted(found.keys() & {*OWN_KEYS, *known, "loss"}):
            raise ConfigError(f"evaluate must return scores of other names than {', '.join(taken)}")
        if self.run.config.best_by == EXACT_MATCH and not is_finite(found.get(EXACT_MATCH)):
            raise ConfigError(f"best_by 'exact_match' needs a number of this name, and evaluate returned {found}")
        wrong = {name: value for name, value in found.items() if not isinstance(value, (int, float, type(None)))}
        require(not wrong, "evaluate must return a dict of numbers by name", wrong)
        return {name: None if value is None else float(value) for name, value in found.items()}
