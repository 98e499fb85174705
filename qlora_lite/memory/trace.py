"""Traces every tensor storage through a run, on real or on fake tensors, and finds what was alive at the peak.

A dispatch mode sees the arguments and results of every operator below autograd, whether forward, backward or the
optimizer runs it. Each storage gets a serial number and a weak reference, so that its end is seen and nothing is kept
alive. The trace stores a log of (serial, change in bytes), not snapshots. The peak, and the storages alive at it, are
found by replaying the log with the final label of each storage. A gradient or an optimizer state that is recognized
only after its allocation therefore counts under its own category from its first byte on.

A storage without a label counts as
- ACTIVATION, if it was created outside of a backward pass and was alive when one started: it waits for that pass;
- TEMPORARY, if it lived shorter, or was created inside a backward pass (recomputed activations included);
- OTHER, if it was first seen as the argument of an operator, so created before or out of sight. It counts from then on.
Activations and temporaries belong to the module that was running when they were created (module_tracker.py).

Not seen: memory that an operator allocates inside itself and frees again, and opaque layouts (MKL-DNN).
Cost: about 30 µs of Python per operator, 16 bytes of log per event and 17 bytes per storage.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate
from types import TracebackType
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from qlora_lite.errors import ConfigError
from qlora_lite.memory.breakdown import Category, Key, MemoryBreakdown
from qlora_lite.memory.module_tracker import ModuleTracker
from qlora_lite.memory.storages import storages_of, tensors_in
from qlora_lite.patches import patched_storage_resize
from qlora_lite.signals import check_signals

# How a storage was first seen, and the category that it has while nobody labels it.
CREATED, CREATED_IN_BACKWARD, WAITS_FOR_BACKWARD, PREEXISTING = range(4)
DEFAULT_CATEGORY = (Category.TEMPORARY, Category.TEMPORARY, Category.ACTIVATION, Category.OTHER)
NO_BACKWARD = -1  # torch's number of the running backward pass where none runs
NO_LABEL = -1

TransientBytes = Callable[[OpOverload, tuple[object, ...]], int]
PersistentBytes = Callable[[OpOverload], int]
Observer = Callable[[OpOverload, tuple[object, ...], dict[str, object]], object]


class TraceEvent(NamedTuple):
    """One change of a storage by `delta` bytes, after which `live` bytes are alive in all."""

    phase: str | None
    serial: int
    delta: int
    live: int
    category: Category
    module: str | None


class _StorageRef(weakref.ref[torch.UntypedStorage]):
    """A weak reference that still knows the serial number and the table key of its storage when that is gone."""

    __slots__ = ("key", "serial")
    key: int
    serial: int


class _ObservingMode(TorchDispatchMode):
    def __init__(self, observe: Observer) -> None:
        super().__init__()
        self._observe = observe

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        if func is torch.ops.prim.device.default:  # fake tensors ask it often, and it allocates nothing
            return func(*args)
        check_signals()
        return self._observe(func, args, kwargs or {})


@final
class StorageTrace:
    """A context manager that traces every storage while it is open, and answers from its log afterwards.

    One trace traces one run. `label` may be called before, during and after the run, `phase` during it. Phases may
    nest: an event belongs to the innermost phase, and the peak of an outer phase includes its inner ones.

    Args:
        transient_workspace_bytes: bytes that an operator (its overload, its arguments) allocates inside itself and
            frees again, on a device that the run only pretends to use.
        persistent_workspace_bytes: bytes that the first such operator of forward, and the first of backward, allocates
            and keeps. They count as OTHER, since no tensor holds them.
    """

    def __init__(
        self,
        transient_workspace_bytes: TransientBytes | None = None,
        persistent_workspace_bytes: PersistentBytes | None = None,
    ) -> None:
        self._transient_workspace_bytes = transient_workspace_bytes
        self._persistent_workspace_bytes = persistent_workspace_bytes
        # CREATED once forward has its workspace, CREATED_IN_BACKWARD once backward has.
        self._have_workspace: set[int] = set()
        self._log = array("q")  # serial, delta, serial, delta, ...
        self._sizes = array("q")  # by serial: bytes now
        self._origins = array("b")  # by serial: CREATED, ...
        self._creators = array("i")  # by serial: index into _modules
        self._labels = array("i")  # by serial: index into _keys, or NO_LABEL
        self._keys: dict[Key, int] = {}
        self._modules: dict[str | None, int] = {None: 0}
        self._module_tracker = ModuleTracker()
        self._refs: dict[int, _StorageRef] = {}
        self._phase_names: list[str | None] = [None]
        self._parents: list[int] = [0]
        self._marks: list[tuple[int, int]] = [(0, 0)]  # from this event on: this entry of a phase
        self._entry = 0
        self._last_backward = NO_BACKWARD
        self._recording = True
        self.is_paused = False
        self._mode: _ObservingMode | None = None
        self._resize_patch: AbstractContextManager[None] | None = None

    def __enter__(self) -> StorageTrace:
        if self._mode is not None:
            raise ConfigError("this StorageTrace has already traced a run; make a new one for each run")
        self._module_tracker.__enter__()
        self._mode = _ObservingMode(self._observe)
        self._mode.__enter__()
        self._resize_patch = patched_storage_resize(self._resized)
        self._resize_patch.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        assert self._mode is not None and self._resize_patch is not None
        self._recording = False
        self._resize_patch.__exit__(kind, error, where)
        self._mode.__exit__(kind, error, where)
        self._module_tracker.__exit__(kind, error, where)

    def track_modules(self, model: nn.Module) -> None:
        """Attributes storages created from now on to the modules of `model`. Call again after modules were replaced."""
        self._module_tracker.track(model)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attributes the events of the block to this phase."""
        parent, entry = self._entry, len(self._phase_names)
        self._phase_names.append(name)
        self._parents.append(parent)
        self._start(entry)
        try:
            yield
        finally:
            self._start(parent)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves operators alone within the block, so that they run at full speed.

        Storages that are known by then are followed to their end. One that is created within the block, and outlives
        it, counts from its next operator or label on, as if it had been created before the run.
        Raises ConfigError if the trace is paused already, or does not run.
        """
        if self.is_paused or self._mode is None or not self._recording:
            raise ConfigError("only a StorageTrace that runs can be paused; it is not open, or paused already")
        # A mode that was entered later lies above this one, and must leave first: then operators pass through, unseen.
        is_top = _get_current_dispatch_mode() is self._mode
        if is_top:
            self._mode.__exit__(None, None, None)
        self.is_paused = True
        try:
            with self._module_tracker.paused():
                yield
        finally:
            self.is_paused = False
            if is_top:
                self._mode.__enter__()

    def label(self, tensor: Tensor, category: Category, module: str | None = None) -> None:
        """Labels the storages of a tensor from their first byte on. The last label of a storage counts."""
        key = self._keys.setdefault((Category(category), module), len(self._keys))
        for storage in storages_of(tensor):
            serial = self._touch(storage, PREEXISTING)
            if serial is not None:
                self._labels[serial] = key

    def live_bytes(self) -> int:
        """Returns the bytes alive now, or at the end of the run."""
        return sum(self._sizes)

    def phases(self) -> tuple[str, ...]:
        """Returns the names of all phases, in the order in which they were first entered."""
        return tuple(dict.fromkeys(name for name in self._phase_names if name is not None))

    def peak(self, phase: str | None = None) -> tuple[int, MemoryBreakdown]:
        """Returns the most bytes alive at once, over the run or over all entries of a phase, and their breakdown.

        Raises ConfigError for a phase that was never entered.
        """
        most, at = self._peak_at(phase)
        return most, self._breakdown_at(at)

    def peak_in(self, phase: str | None = None) -> str | None:
        """Returns the module that was running at the peak; None if none was, or the peak is the start of the phase."""
        _, at = self._peak_at(phase)
        return list(self._modules)[self._creators[self._log[2 * at - 2]]] if at and self._log[2 * at - 1] > 0 else None

    def _peak_at(self, phase: str | None) -> tuple[int, int]:
        """Returns the bytes of the peak, and the number of events before it."""
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
        """Yields every change in the order of time, with the final labels."""
        live, keys = 0, self._final_keys()
        for start, end, entry in self._segments():
            for position in range(start, end):
                serial, delta = self._log[2 * position], self._log[2 * position + 1]
                live += delta
                yield TraceEvent(self._phase_names[entry], serial, delta, live, *keys[serial])

    def _final_keys(self) -> list[Key]:
        """Returns the category and module of each storage, by serial number."""
        labels, modules = list(self._keys), list(self._modules)
        return [
            (DEFAULT_CATEGORY[origin], modules[creator]) if label == NO_LABEL else labels[label]
            for origin, creator, label in zip(self._origins, self._creators, self._labels, strict=True)
        ]

    def _start(self, entry: int) -> None:
        self._entry = entry
        self._marks.append((len(self._log) // 2, entry))

    def _segments(self) -> Iterator[tuple[int, int, int]]:
        """Yields (first event, event after the last, entry of a phase) for each stretch without a change of phase."""
        ends = [position for position, _ in self._marks[1:]] + [len(self._log) // 2]
        for (start, entry), end in zip(self._marks, ends, strict=True):
            yield start, end, entry

    def _is_within(self, entry: int, phase: str) -> bool:
        while entry and self._phase_names[entry] != phase:
            entry = self._parents[entry]
        return entry != 0

    def _breakdown_at(self, position: int) -> MemoryBreakdown:
        """Returns the bytes alive after the first `position` events."""
        by_serial: dict[int, int] = {}
        for event in range(position):
            serial = self._log[2 * event]
            by_serial[serial] = by_serial.get(serial, 0) + self._log[2 * event + 1]
        sizes: dict[Key, int] = {}
        keys = self._final_keys()
        for serial, size in by_serial.items():
            sizes[keys[serial]] = sizes.get(keys[serial], 0) + size
        return MemoryBreakdown(sizes)

    def _observe(self, func: OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        if self.is_paused:
            return func(*args, **kwargs)
        task = torch._C._current_graph_task_id()
        # Numbers of backward passes only grow. A smaller one is an outer pass that continues after an inner one.
        if task > self._last_backward:
            self._last_backward = task
            self._mark_waiting_for_backward()
        # Its argument is a constant created out of sight; on fake tensors, the program does not even use that one.
        if func is not torch.ops.aten.lift_fresh.default:
            self._touch_all((args, tuple(kwargs.values())), PREEXISTING)
        result = func(*args, **kwargs)
        origin = CREATED if task == NO_BACKWARD else CREATED_IN_BACKWARD
        self._touch_all(result, origin)
        if self._transient_workspace_bytes is not None and (size := self._transient_workspace_bytes(func, args)):
            serial = self._added(origin)
            self._note(serial, size)
            self._note(serial, 0)
        self._note_workspace(func, origin)
        return result

    def _note_workspace(self, func: OpOverload, origin: int) -> None:
        if self._persistent_workspace_bytes is None or origin in self._have_workspace:
            return
        if size := self._persistent_workspace_bytes(func):
            self._have_workspace.add(origin)
            self._note(self._added(PREEXISTING), size)

    def _mark_waiting_for_backward(self) -> None:
        for ref in list(self._refs.values()):
            if self._origins[ref.serial] == CREATED:
                self._origins[ref.serial] = WAITS_FOR_BACKWARD

    def _touch_all(self, value: object, origin: int) -> None:
        for tensor in tensors_in(value):
            for storage in storages_of(tensor):
                self._touch(storage, origin)

    def _touch(self, storage: torch.UntypedStorage, origin: int) -> int | None:
        """Notes a storage and its size. Returns its number; None for one first seen in a pause or after the run."""
        ref = self._refs.get(id(storage))
        if ref is None:
            if not self._recording or self.is_paused:
                return None
            ref = _StorageRef(storage, self._gone)
            ref.key, ref.serial = id(storage), self._added(origin)
            self._refs[ref.key] = ref
        self._note(ref.serial, storage.nbytes())
        return ref.serial

    def _added(self, origin: int) -> int:
        """Adds a storage of 0 bytes, and returns its serial number."""
        # The module that created a preexisting storage is unknown.
        creator = None if origin == PREEXISTING else self._module_tracker.current()
        self._sizes.append(0)
        self._origins.append(origin)
        self._creators.append(self._modules.setdefault(creator, len(self._modules)))
        self._labels.append(NO_LABEL)
        return len(self._sizes) - 1

    def _note(self, serial: int, size: int) -> None:
        delta = size - self._sizes[serial]
        if delta and self._recording:
            self._sizes[serial] = size
            # One call for the pair: between two calls, a storage that is collected could add its own event.
            self._log.extend((serial, delta))

    def _gone(self, ref: weakref.ref[torch.UntypedStorage]) -> None:
        assert isinstance(ref, _StorageRef)
        del self._refs[ref.key]
        self._note(ref.serial, 0)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._refs:
            self._touch(storage, PREEXISTING)
