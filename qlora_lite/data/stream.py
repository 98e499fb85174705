"""The batches of a run one after the other, checked, and at which place of them the run is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_lite.checkpoints.safetensors_write import raw_bytes
from qlora_lite.compute.random_state import RandomSources, RandomState
from qlora_lite.data.batching import Batch
from qlora_lite.errors import CheckpointError, ConfigError, TrainingError
from qlora_lite.signals import check_signals

END = object()


def check_batch(batch: Any, vocabulary: int | None) -> None:
    """ConfigError, saying what is wrong, for what is no batch of token rows with labels that this model knows."""
    if not isinstance(batch, dict) or not {"input_ids", "labels"} <= batch.keys():
        got = sorted(batch) if isinstance(batch, dict) else f"a {type(batch).__name__}"
        raise ConfigError(f"a batch must be a dict with tensors input_ids and labels; got {got}")
    ids = batch["input_ids"]
    for name, value in batch.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != len(ids):
            kind = str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(f"{name} of a batch must be a tensor with a row for each of input_ids; got {kind}")
        if name in ("input_ids", "labels") and (value.dim() != 2 or value.dtype != torch.int64):
            raise ConfigError(f"{name} must be int64 of shape (rows, tokens); got {value.dtype} {tuple(value.shape)}")
    if batch["labels"].shape != ids.shape:
        raise ConfigError(
            f"labels must be of the shape of input_ids, {tuple(ids.shape)}; got {tuple(batch['labels'].shape)}"
        )
    low, high = (int(value) for value in ids.aminmax()) if ids.numel() else (0, 0)
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise ConfigError(f"tokens must be in [0, {vocabulary}); got {low if low < 0 else high}")


def _digest(before: str, batch: Mapping[str, Tensor]) -> str:
    """SHA-256 of what came before and of this batch: names, shapes, dtypes and values."""
    sum_ = hashlib.sha256(before.encode())
    for name, value in batch.items():
        sum_.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        sum_.update(raw_bytes(value))
    return sum_.hexdigest()


@dataclass(frozen=True)
class Position:
    """How far a run is in its batches: `taken` of them in this epoch (from 0), which had this digest.

    count: how many an epoch has, where that is known. start: the random numbers' states before the epoch's first one,
    which decided on the order.
    """

    epoch: int
    taken: int
    digest: str
    count: int | None
    start: RandomState


class BatchStream:
    """Batches one by one; a sequence or DataLoader starts over when it ends, an iterator has one epoch.

    sources: where random numbers come from, so that the position can be told and gone to; None for a run that is not
    resumed.
    """

    def __init__(self, batches: Iterable[Batch], vocabulary: int | None, sources: RandomSources | None) -> None:
        self._batches, self._vocabulary, self._sources = batches, vocabulary, sources
        self._again = isinstance(batches, (Sequence, torch.utils.data.DataLoader))
        self._iterator: Iterator[Batch] | None = None
        self._epoch, self._taken, self._digest = 0, 0, ""
        self._start: RandomState | None = None

    @property
    def _count(self) -> int | None:
        try:
            return len(self._batches) if self._again else None  # type: ignore[arg-type]
        except TypeError:  # a DataLoader over a dataset that is read as a stream
            return None

    def _next(self) -> Any:
        """The next batch of this epoch; END behind the last."""
        check_signals()
        if self._iterator is None:
            self._start = None if self._sources is None else self._sources.capture()
            self._iterator = iter(self._batches)
        batch: Any = next(self._iterator, END)
        if batch is not END:
            check_batch(batch, self._vocabulary)
            self._taken += 1
            if self._sources is not None:
                self._digest = _digest(self._digest, batch)
        return batch

    def _next_of_any_epoch(self) -> Any:
        batch = self._next()
        if batch is END and self._again:
            if self._taken == 0:
                raise ConfigError("batches is empty")
            self._iterator, self._epoch, self._taken, self._digest = None, self._epoch + 1, 0, ""
            return self._next_of_any_epoch()
        return batch

    def group(self, size: int, step: int, steps: int) -> Iterator[Batch]:
        """The batches of a step. TrainingError if there are not so many."""
        for _ in range(size):
            batch = self._next_of_any_epoch()
            if batch is END:
                raise TrainingError(f"the batches ended in step {step} of {steps}; give more, or train fewer steps")
            yield batch

    def position(self) -> Position:
        """Where the run is now, for `go_to`."""
        assert self._start is not None
        return Position(self._epoch, self._taken, self._digest, self._count, self._start)

    def go_to(self, position: Position) -> None:
        """Skips, from the beginning, to the place that another run had reached, and checks that all is as it was there.

        CheckpointError for another number of batches, and for others than those. Random numbers are afterwards where
        skipping left them.
        """
        assert self._sources is not None
        if position.count != self._count:
            raise CheckpointError(f"an epoch had {position.count} batches, and has {self._count} here; give the same")
        self._sources.restore(position.start)
        try:
            while self._taken < position.taken and self._next() is not END:
                pass
        except ConfigError:  # no batch at all, so none of those
            self._digest = ""
        if self._digest != position.digest:
            raise CheckpointError(
                f"the first {position.taken} batches of epoch {position.epoch + 1} are not those that the run was "
                f"trained on; give the same data in the same order (an iterator from its beginning)"
            )
        self._epoch = position.epoch
