"""Data-parallel training: each process takes its rows of every batch, and all processes make the same update.

The loss of a step is a sum over its labelled tokens, divided by their number, so its gradient is the sum of the
gradients that the processes compute for their rows. The gradients of the adapters are summed once in each step, in one
reduction. The frozen base is never sent; DistributedDataParallel would send its buffers in each forward pass.

All processes iterate over the same batches and select their rows, so that batches need not be sent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from qlora_lite.choices import DEFAULTS, NAMES, Choices
from qlora_lite.compute.random_state import RandomSources
from qlora_lite.data.batching import rows_between
from qlora_lite.errors import Stopped, TrainingError
from qlora_lite.training.config import SEED_LIMIT

Result = TypeVar("Result")


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
    """The processes of a run, as one of them sees them.

    Every process must call each method, except `rows`.
    """

    def __init__(self, accelerator: Reducer) -> None:
        self._accelerator = accelerator
        self.count = accelerator.num_processes
        self.index = accelerator.process_index

    @property
    def is_alone(self) -> bool:
        return self.count == 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.index == 0

    def rows(self, batch: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Returns the rows of a batch that this process computes; None if it has no row."""
        return batch if self.is_alone else rows_of_process(batch, self.index, self.count)

    def wait(self) -> None:
        """Waits until every process has called it."""
        if not self.is_alone:
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
        whole = self._accelerator.reduce(flat, reduction="sum")
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
        return value if self.is_alone else self._accelerator.reduce(value, reduction="sum")

    def call_in_all(self, function: Callable[[], Result]) -> Result:
        """Calls a function in every process and returns its result in this one.

        An exception in one process is raised there; the others raise Stopped if it was Stopped, and else TrainingError.
        """
        if self.is_alone:
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
