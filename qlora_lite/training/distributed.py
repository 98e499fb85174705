"""Several processes: each one takes its rows of every batch, and all of them make the same update.

The loss of a step is a sum over its labelled tokens, divided by their number, so its gradient is the sum of the
gradients that the processes compute for their rows. The gradients of the adapters are summed once in each step, in one
reduction. A base that is whole in each process is never sent; DistributedDataParallel would send its buffers in each
forward pass. A base in shares (sharding/) is gathered block by block, so all processes must then run the same number of
forward and backward passes: one that has fewer rows computes rows of others, with a factor of 0 in the loss. They stop
by a signal between two steps, together.

All processes iterate over the same batches and select their rows, so that batches need not be sent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from qlora_lite.choices import DEFAULTS, NAMES, Choices
from qlora_lite.compute.random_state import RandomSources
from qlora_lite.data.batching import rows_between
from qlora_lite.errors import Stopped, TrainingError
from qlora_lite.sharding.base import sharded_base
from qlora_lite.sharding.group import Group
from qlora_lite.signals import uninterrupted, waiting_signal
from qlora_lite.training.config import SEED_LIMIT

Result = TypeVar("Result")
# Rows that a process computes, and their factor in the loss: 1, or 0 for rows of another process.
Pass = tuple[dict[str, Tensor], float]


class Reducer(Protocol):
    """The part of accelerate's Accelerator that is used here."""

    num_processes: int
    process_index: int
    device: torch.device

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor: ...
    def wait_for_everyone(self) -> None: ...


def is_first_process() -> bool:
    """Returns whether this process is the first one of a run, by the variable RANK that launchers set."""
    return os.environ.get("RANK", "0") == "0"


def rows_of_process(batch: dict[str, Tensor], process: int, processes: int) -> dict[str, Tensor] | None:
    """Returns the rows of a batch that one of the processes computes, split evenly; None if it has no row."""
    rows = len(batch["input_ids"])
    first, last = (rows * number // processes for number in (process, process + 1))
    return None if first == last else rows_between(batch, first, last)


def split_in_two(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Returns the rows of a batch as two batches, or as one if there is one row."""
    return [part for number in (0, 1) if (part := rows_of_process(batch, number, 2)) is not None]


class Processes:
    """The processes of a run, as one of them sees them. group: those that hold the base in shares, None if it is whole.

    Every process must call each method, except `passes`.
    """

    def __init__(self, accelerator: Reducer, group: Group | None = None) -> None:
        self._accelerator, self.group = accelerator, group
        self.count = accelerator.num_processes
        self.index = accelerator.process_index

    @classmethod
    def of(cls, accelerator: Reducer, model: nn.Module) -> Processes:
        """The processes that train a model."""
        base = sharded_base(model)
        return cls(accelerator, None if base is None else base.group)

    @property
    def is_alone(self) -> bool:
        return self.count == 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.index == 0

    def passes(
        self, batch: dict[str, Tensor], labelled: Callable[[dict[str, Tensor]], Any], halved: bool = False
    ) -> list[Pass]:
        """Returns what this process computes of a batch, each in a forward pass of its own.

        labelled: the number of labels in some rows; rows without a label are left out. halved: in two passes.
        """

        def parts(number: int) -> list[dict[str, Tensor]]:
            rows = rows_of_process(batch, number, self.count)
            split = [] if rows is None else split_in_two(rows) if halved else [rows]
            return [part for part in split if labelled(part) > 0]

        own: list[Pass] = [(part, 1.0) for part in parts(self.index)]
        if self.group is None:
            return own
        missing = max(len(parts(number)) for number in range(self.count)) - len(own)
        if missing == 0:
            return own
        single = (rows_between(batch, row, row + 1) for row in range(len(batch["input_ids"])))
        spare = next(row for row in single if labelled(row) > 0)
        return own + [(spare, 0.0)] * missing

    def wait(self) -> None:
        """Waits until every process has called it."""
        if self.group is not None:
            self.group.wait()
        elif not self.is_alone:
            self._accelerator.wait_for_everyone()

    @contextmanager
    def own_random_numbers(self, sources: RandomSources, seed: int, step: int) -> Iterator[None]:
        """Within the block each process draws other random numbers; before and after it, all draw the same ones."""
        if self.is_alone:
            yield
            return
        before = sources.capture()
        torch.manual_seed(((seed + step) * self.count + self.index) % SEED_LIMIT)
        try:
            yield
        finally:
            sources.restore(before)

    def _sum_(self, tensors: list[Tensor]) -> None:
        """Replaces each tensor by its sum over the processes, computed in fp32 in one reduction."""
        flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
        whole = self.sum(flat)
        for tensor, part in zip(tensors, whole.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def sum_gradients_(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces the gradient of each parameter by its sum over the processes. A missing gradient counts as zero."""
        if self.is_alone:
            return
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self._sum_(gradients)

    def broadcast_(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gives these parameters the values that they have in the first process."""
        if self.is_alone:
            return
        values = [parameter.detach() for parameter in parameters]
        if not self.is_first:
            for value in values:
                value.zero_()
        self._sum_(values)

    def first_choices(self, choices: Callable[[], Choices]) -> Choices:
        """Returns the choices of the first process; `choices` is called in that one alone."""
        own = choices() if self.is_first else DEFAULTS
        if self.is_alone:
            return own
        numbers = [NAMES[key].index(own[key]) if self.is_first else 0 for key in NAMES]
        found = self.sum(torch.tensor(numbers, device=self._accelerator.device)).tolist()
        return {key: NAMES[key][number] for key, number in zip(NAMES, found, strict=True)}

    def sum(self, value: Tensor) -> Tensor:
        """Returns the sum of a tensor over the processes."""
        if self.group is not None:
            return self.group.sum(value)
        return value if self.is_alone else self._accelerator.reduce(value, reduction="sum")

    def agree(self, facts: Callable[[], dict[str, str]]) -> None:
        """Raises ConfigError unless these are the same in all processes that hold a base in shares.

        Others are not compared: they never wait for each other within a step.
        """
        if self.group is not None:
            self.group.agree(facts())

    def without_finite(self, value: Tensor) -> str:
        """Returns " in process 1 and process 2", those whose value is not finite; empty if the base is whole."""
        if self.group is None:
            return ""
        flags = torch.zeros(self.count, device=value.device)
        flags[self.index] = not bool(value.isfinite().all())
        found = [f"process {number}" for number, flag in enumerate(self.group.sum(flags).tolist()) if flag]
        return f" in {' and '.join(found)}" if found else ""

    def call_in_all(self, function: Callable[[], Result]) -> Result:
        """Calls a function in every process and returns its result in this one.

        An exception in one process is raised there; the others raise Stopped if it was Stopped, and else TrainingError.
        With a base in shares, a signal is obeyed before the call, by all, and an error of one ends the others when they
        next wait for it.
        """
        if self.is_alone:
            return function()
        if self.group is not None:
            if (number := self.group.any_signal(waiting_signal())) > 0:
                raise Stopped(number, "stopped by a signal to a process of this run")
            with uninterrupted():
                return function()
        result, raised = None, None
        try:
            result = function()
        except (Exception, Stopped) as error:
            raised = error
        signal = raised.number if isinstance(raised, Stopped) else 0
        own = torch.tensor([raised is not None, signal > 0, signal], dtype=torch.int64, device=self._accelerator.device)
        failed, stopped, signals = self._accelerator.reduce(own, reduction="sum").tolist()
        if raised is not None:
            raise raised
        if stopped:
            raise Stopped(signals // stopped, "stopped by a signal to another process of this run")
        if failed:
            raise TrainingError(f"{failed} of {self.count} processes failed, and say why; this one stops with them")
        return cast(Result, result)
