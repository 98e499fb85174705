"""Several processes on one run: each takes its rows of every batch, and all make the same update.

The loss of a step is a sum over its labelled tokens, divided by their number, so its gradient is the sum of what the
processes find for their rows, whoever has how many. The gradients of the adapters are summed once a step, in one
piece; of the frozen base nothing is ever sent. (DistributedDataParallel would send its buffers at each forward pass.)

Every process goes through the same batches and takes its rows, so that none has to be handed out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from qlora_lite.compute.random_state import RandomSources
from qlora_lite.errors import Stopped, TrainingError
from qlora_lite.training.config import SEED_LIMIT

Made = TypeVar("Made")


def is_first_process() -> bool:
    """Returns whether this process is the first one of a run, by the variable RANK that launchers set."""
    return os.environ.get("RANK", "0") == "0"


def share(batch: dict[str, Tensor], process: int, processes: int) -> dict[str, Tensor] | None:
    """The rows of a batch that are this process's, as even as it goes; None if there are none for it."""
    rows = len(batch["input_ids"])
    first, last = (rows * number // processes for number in (process, process + 1))
    return None if first == last else {name: value[first:last] for name, value in batch.items()}


def halves(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The rows of a batch in two parts; one part if there is one row."""
    return [part for number in (0, 1) if (part := share(batch, number, 2)) is not None]


class Processes:
    """The processes of a run, seen from one of them; accelerator: accelerate's, which started them.

    Each method but `rows` has to be called by all of them.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.count: int = accelerator.num_processes
        self.number: int = accelerator.process_index

    @property
    def alone(self) -> bool:
        return self.count == 1

    @property
    def writes(self) -> bool:
        """Whether this one writes the run's files."""
        return self.number == 0

    def rows(self, batch: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """This process's rows of a batch; None without any."""
        return batch if self.alone else share(batch, self.number, self.count)

    def wait(self) -> None:
        """Until all have come here."""
        if not self.alone:
            self._accelerator.wait_for_everyone()

    @contextmanager
    def own_random_numbers(self, sources: RandomSources, seed: int, step: int) -> Iterator[None]:
        """Within the block each process draws other numbers; before and after it, all draw the same ones."""
        if self.alone:
            yield
            return
        before = sources.capture()
        torch.manual_seed(((seed + step) * self.count + self.number) % SEED_LIMIT)
        try:
            yield
        finally:
            sources.restore(before)

    def _sum_(self, tensors: list[Tensor]) -> None:
        """Makes each of these tensors the sum over the processes, added up in fp32, in one reduction."""
        flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
        whole = self._accelerator.reduce(flat, reduction="sum")
        for tensor, part in zip(tensors, whole.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def sum_gradients_(self, parameters: Iterable[nn.Parameter]) -> None:
        """Makes the gradient of each parameter the sum over the processes; one that has none adds nothing."""
        if self.alone:
            return
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self._sum_(gradients)

    def same_start_(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gives these parameters the values that the first process has."""
        if self.alone:
            return
        values = [parameter.detach() for parameter in parameters]
        if not self.writes:
            for value in values:
                value.zero_()
        self._sum_(values)

    def sum(self, value: Tensor) -> Tensor:
        """A number summed over the processes."""
        return value if self.alone else self._accelerator.reduce(value, reduction="sum")

    def together(self, make: Callable[[], Made]) -> Made:
        """What `make` gives here. What ends it in one process is raised there, and ends it in the others too.

        By Stopped, if it was a signal, or TrainingError.
        """
        if self.alone:
            return make()
        made, ended = None, None
        try:
            made = make()
        except (Exception, Stopped) as error:
            ended = error
        signal = ended.number if isinstance(ended, Stopped) else 0
        own = torch.tensor([ended is not None, signal > 0, signal], dtype=torch.int64, device=self._accelerator.device)
        failed, stopped, signals = self._accelerator.reduce(own, reduction="sum").tolist()
        if ended is not None:
            raise ended
        if stopped:
            raise Stopped(signals // stopped, "stopped by a signal to another process of this run")
        if failed:
            raise TrainingError(f"{failed} of {self.count} processes failed, and say why; this one stops with them")
        return cast(Made, made)
