"""Follows every tensor storage through a run, on real or on fake tensors, and tells where the bytes were at the peak.

A dispatch mode sees the arguments and results of each operator below autograd: what forward, backward and optimizer
allocate alike. Each storage gets a serial number and a weak reference, so that its end is seen too and nothing is
kept alive. What is stored is a log of (serial, change in bytes), not snapshots; the peak and what lived then are
found by replaying it with the label that each storage has in the end. So a gradient or an optimizer state that is
recognized only after it was allocated stands under its own name in every earlier moment.

Storages that nobody labels:
- made outside of a backward pass and alive when one starts: ACTIVATION, they wait for it;
- made otherwise (shorter lived, or made inside a backward pass, recomputed activations included): TEMPORARY;
- met first as the argument of an operator, so not seen being made: OTHER, counted from that moment on.
The first two belong to the module that was running (running.py) when they were made.

What an operator allocates inside itself and frees again is invisible here, and so are opaque layouts (MKL-DNN).
Cost: some 30 µs of Python an operator, 16 bytes of log an event and 17 a storage.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from types import TracebackType
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from qlora_lite.errors import ConfigError
from qlora_lite.memory.breakdown import Category, Key, MemoryBreakdown
from qlora_lite.memory.running import RunningModule
from qlora_lite.signals import poll

# How a storage came into sight, and what it is as long as nobody labels it.
MADE, MADE_IN_BACKWARD, WAITING, MET = range(4)
UNLABELLED = (Category.TEMPORARY, Category.TEMPORARY, Category.ACTIVATION, Category.OTHER)
Hidden = Callable[[Any, tuple[Any, ...]], int]
Kept = Callable[[Any], int]
NO_BACKWARD = -1
NO_LABEL = -1

_COMPRESSED_ROWS = ("crow_indices", "col_indices", "values")
_COMPRESSED_COLUMNS = ("ccol_indices", "row_indices", "values")
SPARSE_PARTS: dict[torch.layout, tuple[str, ...]] = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: _COMPRESSED_ROWS,
    torch.sparse_bsr: _COMPRESSED_ROWS,
    torch.sparse_csc: _COMPRESSED_COLUMNS,
    torch.sparse_bsc: _COMPRESSED_COLUMNS,
}


class TraceEvent(NamedTuple):
    """One change: `delta` bytes of the storage `serial`, after which `live` bytes are alive."""

    phase: str | None
    serial: int
    delta: int
    live: int
    category: Category
    module: str | None


class _StorageRef(weakref.ref[torch.UntypedStorage]):
    """A weak reference that knows its storage's serial number and place in the table when the storage is gone."""

    __slots__ = ("key", "serial")
    key: int
    serial: int


class _Observing(TorchDispatchMode):
    def __init__(self, observe: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        self._observe = observe

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        poll()
        return self._observe(func, args, kwargs or {})


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors_in(item)


def storages_of(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages behind a tensor: one if it is dense, those of its parts if it is sparse or wraps other tensors."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from storages_of(getattr(tensor, name))
    elif tensor.layout in SPARSE_PARTS:
        for name in SPARSE_PARTS[tensor.layout]:
            yield from storages_of(getattr(tensor, name)())
    # A meta tensor has a size and no memory; a fake tensor answers with the device it stands for.
    elif tensor.layout is torch.strided and tensor.device.type != "meta":
        yield tensor.untyped_storage()


@final
class StorageTrace:
    """A context manager that follows every storage while it is open; afterwards it answers from its log.

    `label` may be called before, in and after the run, `phase` in it. One trace follows one run. Phases may nest:
    an event belongs to the innermost, the peak of an outer phase includes its inner ones.

    hidden_bytes: what an operator (its overload, its arguments) allocates inside itself and frees again, for a device
    that is not at hand.
    kept_bytes: what the first operator of forward, and the first of backward, for which it is not 0 allocates for all
    that follow; OTHER, since no tensor shows it.
    """

    def __init__(self, hidden_bytes: Hidden | None = None, kept_bytes: Kept | None = None) -> None:
        self._hidden_bytes = hidden_bytes
        self._kept_bytes = kept_bytes
        self._keeping: set[int] = set()  # MADE and MADE_IN_BACKWARD, once forward and backward have it
        self._log = array("q")  # serial, delta, serial, delta, ...
        self._sizes = array("q")  # by serial: bytes now
        self._origins = array("b")  # by serial: MADE, ...
        self._makers = array("i")  # by serial: index into _modules, what was running when it came into sight
        self._labels = array("i")  # by serial: index into _keys, or NO_LABEL
        self._keys: dict[Key, int] = {}
        self._modules: dict[str | None, int] = {None: 0}
        self._running = RunningModule()
        self._refs: dict[int, _StorageRef] = {}
        self._phase_names: list[str | None] = [None]
        self._parents: list[int] = [0]
        self._marks: list[tuple[int, int]] = [(0, 0)]  # from this position of the log on: this entry of a phase
        self._entry = 0
        self._last_backward = NO_BACKWARD
        self._recording = True
        self._mode: _Observing | None = None
        self._restore_resize: Callable[[], None] | None = None

    def __enter__(self) -> StorageTrace:
        if self._mode is not None:
            raise ConfigError("a StorageTrace follows one run and this one was used already; make a new one")
        self._running.__enter__()
        self._mode = _Observing(self._observe)
        self._mode.__enter__()
        self._restore_resize = _watch_resize(self._resized)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        assert self._mode is not None and self._restore_resize is not None
        self._recording = False
        self._restore_resize()
        self._mode.__exit__(kind, error, where)
        self._running.__exit__(kind, error, where)

    def follow(self, model: nn.Module) -> None:
        """Says whose modules the storages that are made from now on may belong to; again after some were replaced."""
        self._running.follow(model)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Names what happens inside."""
        parent, entry = self._entry, len(self._phase_names)
        self._phase_names.append(name)
        self._parents.append(parent)
        self._start(entry)
        try:
            yield
        finally:
            self._start(parent)

    def label(self, tensor: Tensor, category: Category, module: str | None = None) -> None:
        """Says what a tensor's storage is for, from its beginning on; the last label of a storage counts."""
        key = self._keys.setdefault((Category(category), module), len(self._keys))
        for storage in storages_of(tensor):
            serial = self._touch(storage, MET)
            if serial is not None:
                self._labels[serial] = key

    def live_bytes(self) -> int:
        """Bytes alive now, or at the end of the run."""
        return sum(self._sizes)

    def phases(self) -> tuple[str, ...]:
        """The names of all phases, in the order in which they were first entered."""
        return tuple(dict.fromkeys(name for name in self._phase_names if name is not None))

    def peak(self, phase: str | None = None) -> tuple[int, MemoryBreakdown]:
        """The most bytes that were alive at once, over the run or over all entries of a phase, and what they were.

        Raises ConfigError for a phase that was never entered.
        """
        most, at = self._peak_at(phase)
        return most, self._breakdown_at(at)

    def peak_in(self, phase: str | None = None) -> str | None:
        """The module that was running when the peak was reached; None if none was, or the peak is the phase's start."""
        _, at = self._peak_at(phase)
        return list(self._modules)[self._makers[self._log[2 * at - 2]]] if at and self._log[2 * at - 1] > 0 else None

    def _peak_at(self, phase: str | None) -> tuple[int, int]:
        """Bytes of the peak, and how many events came before it."""
        if phase is not None and phase not in self._phase_names:
            raise ConfigError(f"no phase {phase!r} was entered; there were: {', '.join(self.phases()) or 'none'}")
        live = array("q", accumulate(self._log[1::2], initial=0))
        most, at = -1, 0
        for start, end, entry in self._segments():
            if phase is None or self._is_within(entry, phase):
                part = live[start : end + 1]
                if max(part) > most:
                    most = max(part)
                    at = start + part.index(most)
        return most, at

    def timeline(self) -> Iterator[TraceEvent]:
        """Every change in the order in which it happened, with the final labels."""
        live, keys = 0, self._final_keys()
        for start, end, entry in self._segments():
            for position in range(start, end):
                serial, delta = self._log[2 * position], self._log[2 * position + 1]
                live += delta
                yield TraceEvent(self._phase_names[entry], serial, delta, live, *keys[serial])

    def _final_keys(self) -> list[Key]:
        """What each storage is, by serial."""
        labels, modules = list(self._keys), list(self._modules)
        return [
            (UNLABELLED[origin], modules[maker]) if label == NO_LABEL else labels[label]
            for origin, maker, label in zip(self._origins, self._makers, self._labels, strict=True)
        ]

    def _start(self, entry: int) -> None:
        self._entry = entry
        self._marks.append((len(self._log) // 2, entry))

    def _segments(self) -> Iterator[tuple[int, int, int]]:
        """(first event, event after the last, entry of a phase) for each stretch without a change of phase."""
        ends = [position for position, _ in self._marks[1:]] + [len(self._log) // 2]
        for (start, entry), end in zip(self._marks, ends, strict=True):
            yield start, end, entry

    def _is_within(self, entry: int, phase: str) -> bool:
        while entry and self._phase_names[entry] != phase:
            entry = self._parents[entry]
        return entry != 0

    def _breakdown_at(self, position: int) -> MemoryBreakdown:
        """What is alive after the first `position` events."""
        by_serial: dict[int, int] = {}
        for event in range(position):
            serial = self._log[2 * event]
            by_serial[serial] = by_serial.get(serial, 0) + self._log[2 * event + 1]
        sizes: dict[Key, int] = {}
        keys = self._final_keys()
        for serial, size in by_serial.items():
            sizes[keys[serial]] = sizes.get(keys[serial], 0) + size
        return MemoryBreakdown(sizes)

    def _observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        task = torch._C._current_graph_task_id()
        # Task numbers only grow, so a smaller one is an outer backward pass that goes on after an inner one.
        if task > self._last_backward:
            self._last_backward = task
            self._hold_for_backward()
        # The argument here is a constant made out of sight, and on fake tensors not what the program goes on with.
        if func is not torch.ops.aten.lift_fresh.default:
            self._touch_all((args, tuple(kwargs.values())), MET)
        result = func(*args, **kwargs)
        origin = MADE if task == NO_BACKWARD else MADE_IN_BACKWARD
        self._touch_all(result, origin)
        if self._hidden_bytes is not None and (size := self._hidden_bytes(func, args)):
            serial = self._added(origin)
            self._note(serial, size)
            self._note(serial, 0)
        if self._kept_bytes is not None and origin not in self._keeping and (kept := self._kept_bytes(func)):
            self._keeping.add(origin)
            self._note(self._added(MET), kept)
        return result

    def _hold_for_backward(self) -> None:
        for ref in list(self._refs.values()):
            if self._origins[ref.serial] == MADE:
                self._origins[ref.serial] = WAITING

    def _touch_all(self, value: Any, origin: int) -> None:
        for tensor in _tensors_in(value):
            for storage in storages_of(tensor):
                self._touch(storage, origin)

    def _touch(self, storage: torch.UntypedStorage, origin: int) -> int | None:
        """The storage's serial number after noting it, if it is new, and its size; None for one met after the run."""
        ref = self._refs.get(id(storage))
        if ref is None:
            if not self._recording:
                return None
            ref = _StorageRef(storage, self._gone)
            ref.key, ref.serial = id(storage), self._added(origin)
            self._refs[ref.key] = ref
        self._note(ref.serial, storage.nbytes())
        return ref.serial

    def _added(self, origin: int) -> int:
        """The serial number of a new storage."""
        # What is met was made before, by nobody knows whom.
        maker = None if origin == MET else self._running.now()
        self._sizes.append(0)
        self._origins.append(origin)
        self._makers.append(self._modules.setdefault(maker, len(self._modules)))
        self._labels.append(NO_LABEL)
        return len(self._sizes) - 1

    def _note(self, serial: int, size: int) -> None:
        delta = size - self._sizes[serial]
        if delta and self._recording:
            self._sizes[serial] = size
            # One call for the pair: a storage that is collected in between would tear two calls apart.
            self._log.extend((serial, delta))

    def _gone(self, ref: Any) -> None:
        del self._refs[ref.key]
        self._note(ref.serial, 0)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._refs:
            self._touch(storage, MET)


def _watch_resize(resized: Callable[[torch.UntypedStorage], None]) -> Callable[[], None]:
    """Calls `resized` after every `UntypedStorage.resize_`, which no dispatch mode sees; returns what undoes that."""
    owner: Any = torch.UntypedStorage
    inherited = "resize_" not in vars(owner)
    original = owner.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        result = original(storage, size)
        resized(storage)
        return result

    def restore() -> None:
        if inherited:
            del owner.resize_
        else:
            owner.resize_ = original

    owner.resize_ = resize_
    return restore
