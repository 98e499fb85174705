"""The batches of a training run, one after the other, checked, with a position that a resumed run can skip to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_lite.architecture import ROWS
from qlora_lite.checkpoints.safetensors_write import raw_bytes
from qlora_lite.compute.random_state import RandomSources, RandomState
from qlora_lite.data.batching import Batch
from qlora_lite.errors import CheckpointError, ConfigError, TrainingError
from qlora_lite.signals import check_signals
from qlora_lite.tasks import CAUSAL_LM, IMAGE_TEXT_TO_TEXT, MASKED_LM, Task

# Tasks whose batches have a label for each token.
WITH_A_LABEL_EACH = (CAUSAL_LM, IMAGE_TEXT_TO_TEXT, MASKED_LM)


def check_batch(batch: object, vocabulary: int | None, task: Task = CAUSAL_LM) -> None:
    """Raises ConfigError unless `batch` is a dict of tensors with equally many rows, with token ids and labels.

    vocabulary: the number of token ids of the model; None where it is not known. task: of the model; only those that
    label tokens have a label for each of input_ids.
    """
    if not isinstance(batch, dict) or not {"input_ids", "labels"} <= batch.keys():
        got = sorted(batch) if isinstance(batch, dict) else f"a {type(batch).__name__}"
        raise ConfigError(f"a batch must be a dict with tensors input_ids and labels; got {got}")
    ids = batch["input_ids"]
    for name, value in batch.items():
        counts = batch.get(f"{name}{ROWS}")
        rows = len(ids) if counts is None else int(counts.sum())
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != rows:
            kind = str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(f"{name} of a batch must be a tensor with a row for each of input_ids; got {kind}")
        is_tokens = name.endswith("input_ids") or (name == "labels" and task in WITH_A_LABEL_EACH)
        if is_tokens and (value.dim() != 2 or value.dtype != torch.int64):
            raise ConfigError(f"{name} must be int64 of shape (rows, tokens); got {value.dtype} {tuple(value.shape)}")
    if task in WITH_A_LABEL_EACH and batch["labels"].shape != ids.shape:
        raise ConfigError(
            f"labels must be of the shape of input_ids, {tuple(ids.shape)}; got {tuple(batch['labels'].shape)}"
        )
    for ids in (value for name, value in batch.items() if name.endswith("input_ids")):
        low, high = (int(value) for value in ids.aminmax()) if ids.numel() else (0, 0)
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            raise ConfigError(f"tokens must be in [0, {vocabulary}); got {low if low < 0 else high}")


def batch_digest(before: str, batch: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of the digest `before` and of a batch: names, dtypes, shapes and values."""
    digest = hashlib.sha256(before.encode())
    for name, value in batch.items():
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(raw_bytes(value))
    return digest.hexdigest()


@dataclass(frozen=True)
class Position:
    """How far a run is in its batches.

    epoch: from 0. taken: batches taken in this epoch. digest: of these batches. count: batches of an epoch, None where
    it is not known. random: states of the generators before the first batch of the epoch, which decide on the order.
    """

    epoch: int
    taken: int
    digest: str
    count: int | None
    random: RandomState

    def to_json(self) -> dict[str, object]:
        """Returns the position as plain data for `json.dumps`, without the states of the generators."""
        return {"epoch": self.epoch, "taken": self.taken, "digest": self.digest, "count": self.count}

    @classmethod
    def from_json(cls, plain: Mapping[str, object], random: RandomState) -> Position:
        """Returns the position that `to_json` was called on. The types of `plain` must have been checked."""
        return cls(random=random, **{name: plain[name] for name in ("epoch", "taken", "digest", "count")})  # type: ignore[arg-type]


class BatchStream:
    """The batches of a run. A sequence or a DataLoader starts again when it ends; an iterator has one epoch.

    vocabulary, task: as in `check_batch`. sources: the random numbers of the run, which `position` and `skip_to` need;
    None for a run that is not resumed.
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        vocabulary: int | None,
        sources: RandomSources | None,
        task: Task = CAUSAL_LM,
    ) -> None:
        self._batches, self._vocabulary, self._sources, self._task = batches, vocabulary, sources, task
        self._repeats = isinstance(batches, (Sequence, torch.utils.data.DataLoader))
        self._iterator: Iterator[Batch] | None = None
        self._epoch, self._taken, self._digest = 0, 0, ""
        self._epoch_random: RandomState | None = None

    @property
    def _count(self) -> int | None:
        try:
            return len(self._batches) if self._repeats else None  # type: ignore[arg-type]
        except TypeError:  # a DataLoader over a dataset that is read as a stream
            return None

    def _next_of_epoch(self) -> Batch | None:
        """Returns the next batch of this epoch; None after the last one."""
        check_signals()
        if self._iterator is None:
            self._epoch_random = None if self._sources is None else self._sources.capture()
            self._iterator = iter(self._batches)
        try:
            batch = next(self._iterator)
        except StopIteration:
            return None
        check_batch(batch, self._vocabulary, self._task)
        self._taken += 1
        if self._sources is not None:
            self._digest = batch_digest(self._digest, batch)
        return batch

    def _next(self) -> Batch | None:
        """Returns the next batch, of the next epoch if this one has ended; None after the last batch of an iterator."""
        batch = self._next_of_epoch()
        if batch is None and self._repeats:
            if self._taken == 0:
                raise ConfigError("batches is empty")
            self._iterator, self._epoch, self._taken, self._digest = None, self._epoch + 1, 0, ""
            return self._next()
        return batch

    def take(self, count: int, step: int, steps: int) -> Iterator[Batch]:
        """Yields the `count` batches of a step. Raises TrainingError if there are not so many."""
        for _ in range(count):
            batch = self._next()
            if batch is None:
                raise TrainingError(f"the batches ended in step {step} of {steps}; give more, or train fewer steps")
            yield batch

    def position(self) -> Position:
        """Returns the current position, for `skip_to`."""
        assert self._epoch_random is not None
        return Position(self._epoch, self._taken, self._digest, self._count, self._epoch_random)

    def skip_to(self, position: Position) -> None:
        """Skips the batches before `position` and compares them with those that the other run took.

        Changes the random numbers of the run: they are afterwards as skipping left them.
        Raises CheckpointError if the number of batches, or a batch, is another.
        """
        assert self._sources is not None
        if position.count != self._count:
            raise CheckpointError(f"an epoch had {position.count} batches, and has {self._count} here; give the same")
        self._sources.restore(position.random)
        try:
            while self._taken < position.taken and self._next_of_epoch() is not None:
                pass
        except ConfigError:  # the batch is not valid, so it is not one of the run's
            self._digest = ""
        if self._digest != position.digest:
            raise CheckpointError(
                f"the first {position.taken} batches of epoch {position.epoch + 1} are not those that the run was "
                f"trained on; give the same data in the same order (an iterator from its beginning)"
            )
        self._epoch = position.epoch
