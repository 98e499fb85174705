"""The processes that hold a base in shares, as one of them sees them.

A collective fails in all other processes once one of them has ended, because its connections close then. What is said
is found out afterwards: a process that ends by an error leaves its reason in torch's store, and one that was killed is
seen by its number on the same machine.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from qlora_lite.compute.devices import is_out_of_memory
from qlora_lite.errors import ConfigError, Stopped, TrainingError, listing
from qlora_lite.signals import signals_ignored_from_here

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# torch 2.13 renamed it.
_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
WAIT_FOR_REASON, POLL = 8.0, 0.1  # seconds
OUT_OF_MEMORY = "memory ran out"


class LostProcess(TrainingError):
    """Another process of the run has ended; the text names it and gives the reason."""


class _Place(NamedTuple):
    """Where a process runs: a number for its machine, and its number there."""

    machine: int
    pid: int


def _number(text: str) -> int:
    """Returns a number of 63 bits that stands for a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def check_launched() -> None:
    """Raises ConfigError in a process that no launcher started, or that it started alone."""
    if missing := [name for name in LAUNCHED if name not in os.environ]:
        raise ConfigError(
            f"a base in shares needs several processes: start them by torchrun --nproc-per-node N or accelerate "
            f"launch, which set {', '.join(missing)}"
        )
    if os.environ["WORLD_SIZE"] == "1":
        raise ConfigError("a base in shares needs several processes; got one (torchrun --nproc-per-node 2)")


class Group:
    """The processes that `torchrun` or `accelerate launch` started. Every process must call each method, in one order.

    received: bytes that this process has got of other shares. A method that waits for other processes raises
    LostProcess if one of them ends.
    """

    def __init__(self) -> None:
        self.index, self.count = dist.get_rank(), dist.get_world_size()
        self.device = _own_device()
        self.received = 0
        self._store: Any = dist.distributed_c10d._get_default_store()
        self._agreements = 0
        own = torch.tensor([_number(socket.gethostname()), os.getpid()], device=self.device)
        self._places = [_Place(*row) for row in self._rows(own)]

    @classmethod
    def join(cls) -> Group:
        """Joins the processes of this run. Raises the ConfigError of `check_launched`."""
        check_launched()
        if not dist.is_initialized():
            device = _own_device()
            if device.type == "cpu":
                dist.init_process_group("gloo")
            else:
                torch.get_device_module(device).set_device(device)
                dist.init_process_group()
        return cls()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Turns the error of a collective into one that names the lost process."""
        try:
            yield
        except RuntimeError as error:
            signals_ignored_from_here()  # the launcher ends the others by SIGTERM, which is not the reason
            reason = self._reason()
            self._let_others_read()
            raise LostProcess(f"{reason}; process {self.index} of {self.count} ends with it") from error

    def sum(self, tensor: Tensor) -> Tensor:
        """Returns the sum of a tensor over the processes."""
        total = tensor.clone()
        with self._waiting():
            dist.all_reduce(total)
        return total

    def gather(self, own: Tensor, into: Tensor) -> Callable[[], None]:
        """Begins to gather the shares `own` of all processes, one after the other, in `into`; returns the wait."""
        with self._waiting():
            work = _gather(into, own, async_op=True)
        self.received += own.nbytes * (self.count - 1)

        def wait() -> None:
            with self._waiting():
                work.wait()

        return wait

    def wait(self) -> None:
        """Waits until every process has called it."""
        self.sum(torch.zeros((), device=self.device))

    def _rows(self, own: Tensor) -> list[list[int]]:
        """Returns the integers `own` of every process."""
        rows = own.new_zeros((self.count, len(own)))
        rows[self.index] = own
        return [[int(value) for value in row] for row in self.sum(rows).tolist()]

    def agree(self, facts: Mapping[str, str]) -> None:
        """Raises ConfigError in every process unless the facts are the same in all, naming those that differ."""
        names = list(facts)
        rows = self._rows(torch.tensor([_number(facts[name]) for name in names], device=self.device))
        others = [number for number, row in enumerate(rows) if row != rows[0]]
        if others:
            wrong = [name for place, name in enumerate(names) if any(row[place] != rows[0][place] for row in rows)]
            who = listing((f"process {number}" for number in others), 4)
            raise ConfigError(
                f"{who} of {self.count} has another {' and '.join(wrong)} than process 0; give all processes the same"
            )

    def any_signal(self, number: int) -> int:
        """Returns the number of a signal that a process got, 0 for none; `number` is this process's."""
        return max(row[0] for row in self._rows(torch.tensor([number], device=self.device)))

    def all_texts(self, own: str) -> list[str]:
        """Returns the non-empty texts of all processes, in their order."""
        has = self._rows(torch.tensor([bool(own)], device=self.device, dtype=torch.int64))
        self._agreements += 1
        key = f"qlora_lite/text/{self._agreements}"
        if own:
            self._store.set(f"{key}/{self.index}", own)
        with self._waiting():
            found = [self._store.get(f"{key}/{number}").decode() for number, (there,) in enumerate(has) if there]
        self.wait()  # the store ends with the first process, which may end by what it has read
        return found

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Leaves the reason for the other processes if the block ends by an exception."""
        try:
            yield
        except LostProcess:
            raise
        except (Exception, Stopped) as error:
            reason = OUT_OF_MEMORY if is_out_of_memory(error) else str(error) or type(error).__name__
            self._tell_in(f"qlora_lite/ended/{self.index}", " ".join(reason.split()))
            raise

    def _tell_in(self, key: str, text: str) -> None:
        """Leaves a text in torch's store, unless it has ended."""
        try:
            if self._store is not None:
                self._store.set(key, text)
        except RuntimeError:
            self._store = None

    def _found(self, key: str) -> str | None:
        """Returns a text that another process left; None if it left none, or if the store has ended."""
        try:
            return self._store.get(key).decode() if self._store is not None and self._store.check([key]) else None
        except RuntimeError:
            self._store = None
            return None

    def _let_others_read(self) -> None:
        """Waits a little until the others have found the reason too, in the process that keeps torch's store."""
        self._tell_in(f"qlora_lite/knows/{self.index}", "")
        until = time.monotonic() + WAIT_FOR_REASON
        while self.index == 0 and self._store is not None and time.monotonic() < until:
            others = [number for number in range(1, self.count) if self._may_run(number)]
            if all(self._found(f"qlora_lite/knows/{number}") is not None for number in others):
                return
            time.sleep(POLL)

    def _may_run(self, number: int) -> bool:
        """Whether another process runs, or is on another machine."""
        place = self._places[number]
        return place.machine != self._places[self.index].machine or _is_running(place.pid)

    def _reason(self) -> str:
        """Returns which process ended, and why, as far as that can be known."""
        others = [number for number in range(self.count) if number != self.index]
        until = time.monotonic() + WAIT_FOR_REASON
        while time.monotonic() < until:
            gone = [number for number in others if not self._may_run(number)]
            for number in others:
                if (told := self._found(f"qlora_lite/ended/{number}")) is not None:
                    return f"process {number} of {self.count} ended: {told}"
            if gone and self._store is None:
                return f"process {gone[0]} of {self.count} ended: it was killed, or says itself why"
            if gone:
                return (
                    f"process {gone[0]} of {self.count} ended without a word: it was killed, by a user, a scheduler "
                    f"or the system when memory ran out"
                )
            time.sleep(POLL)
        return f"the connection to another of {self.count} processes was lost"


def _own_device() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else torch.device(found.type, int(os.environ.get("LOCAL_RANK", "0")))
