"""Reads damaged files, and checks what reading them does. Part of endure.py; the tests use it too.

A reader must raise a QLoRAError or return what an independent reader of the format returns. It has one second, and
2 x the file + 200 MiB of memory, and must not write anything.
"""

from __future__ import annotations

import json
import random
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

import bad_checkpoints
import bad_files
from qlora_lite import QuantConfig, load_adapter_, load_quantized
from qlora_lite.checkpoints.safetensors_read import TensorFiles, read_safetensors
from qlora_lite.data.records import read_records
from qlora_lite.errors import QLoRAError
from qlora_lite.lora.adapters import lora_layers

SECONDS = 1.0
SPARE_BYTES = 200 << 20


class Wrong(AssertionError):
    """A reader did something that is not allowed."""


class _TooLong(BaseException):
    """The time limit. Not an Exception, so that no reader mistakes it for an error of the file."""


def _equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == tensor.dtype
        and ours[name].shape == tensor.shape
        and torch.equal(ours[name].view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8))
        for name, tensor in theirs.items()
    )


def _read_safetensors(folder: Path) -> None:
    try:
        ours = read_safetensors(folder / bad_files.TENSORS)
    except QLoRAError:
        return
    try:
        theirs = safetensors.torch.load((folder / bad_files.TENSORS).read_bytes())
    except Exception as error:
        raise Wrong(f"accepted a file that safetensors refuses: {error}") from error
    if not _equal(ours, theirs):
        raise Wrong("returned other values than safetensors does")


def _read_index(folder: Path) -> None:
    try:
        found = dict(TensorFiles(folder).items())
    except QLoRAError:
        return
    good = bad_files.good_tensors()
    if not found.keys() <= good.keys() or not _equal(found, {name: good[name] for name in found}):
        raise Wrong("returned tensors that are in no shard of the folder")
    if found.keys() != (listed := json.loads((folder / bad_files.INDEX).read_text())["weight_map"]).keys():
        raise Wrong(f"returned {sorted(found)} where the index lists {sorted(listed)}")


def adaptable() -> nn.Module:
    """Returns a small model whose layers can be adapted."""
    torch.manual_seed(0)
    return nn.ModuleDict({"first": nn.Linear(6, 5), "second": nn.Linear(5, 4), "words": nn.Embedding(9, 6)})


def _read_adapter(folder: Path) -> None:
    model = adaptable()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        load_adapter_(model, folder)
    except QLoRAError:
        after = model.state_dict()
        if after.keys() != before.keys() or any(not torch.equal(after[name], value) for name, value in before.items()):
            raise Wrong("a refused adapter changed the model") from None
        return
    stored = safetensors.torch.load((folder / bad_files.ADAPTER_TENSORS).read_bytes())
    for name, layer in lora_layers(model).items():
        if not all(values.isfinite().all() for values in (layer.lora_A, layer.lora_B)):
            raise Wrong(f"{name} has values that are not finite")
        if not torch.equal(layer.lora_A, stored[f"base_model.model.{name}.lora_A.weight"]):
            raise Wrong(f"{name} has another A than the file")


def _read_records(folder: Path) -> None:
    try:
        found = read_records(folder / bad_files.RECORDS)
    except QLoRAError:
        return
    lines = [line for line in (folder / bad_files.RECORDS).read_bytes().decode("utf-8-sig").split("\n") if line.strip()]
    if found != [json.loads(line) for line in lines]:
        raise Wrong("returned other records than the file has")


def _read_checkpoint(folder: Path) -> None:
    try:
        model = load_quantized(folder, QuantConfig())
    except QLoRAError:
        return
    held = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    if bad := [name for name, value in held.items() if not value.isfinite().all()]:
        raise Wrong(f"loaded NaN or infinity in {bad[:3]}")
    if any(value.is_meta for value in model.state_dict().values()):
        raise Wrong("left weights on meta")


@dataclass(frozen=True)
class Family:
    """A kind of file. damage: writes a case into an empty folder, and describes it. read: reads it, or raises Wrong."""

    name: str
    damage: Callable[[Path, random.Random], str]
    read: Callable[[Path], None]


FAMILIES = (
    Family("safetensors", bad_files.damage_safetensors, _read_safetensors),
    Family("index", bad_files.damage_index, _read_index),
    Family("adapter", bad_files.damage_adapter, _read_adapter),
    Family("records", bad_files.damage_records, _read_records),
    Family("checkpoint", bad_checkpoints.damage_checkpoint, _read_checkpoint),
)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises Wrong if the block takes longer."""

    def stop(number: int, frame: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _TooLong:  # also where the time is over just before the timer is stopped
        raise Wrong(f"took more than {seconds} s") from None
    finally:
        signal.signal(signal.SIGALRM, before)


def _peak() -> int:
    """Returns the peak of resident bytes of this process since `_restart_peak` (VmHWM of proc(5))."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/self/status has no VmHWM")


def _restart_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns size and time of change of everything below the folder."""
    found = {path: path.lstat() for path in folder.rglob("*")}
    return {str(path): (state.st_size, state.st_mtime_ns) for path, state in found.items()}


def run_case(family: Family, seed: int) -> str | None:
    """Returns None if the case of this seed is handled correctly, else the problem, after the family and the seed."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "input"
        folder.mkdir()
        what = family.damage(folder, random.Random(f"{family.name} {seed}"))
        before = listing(Path(scratch))
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file() and not path.is_symlink())
        resident = _restart_peak()
        try:
            with limited(SECONDS):
                family.read(folder)
            if (taken := _peak() - resident) > 2 * size + SPARE_BYTES:
                raise Wrong(f"took {taken:,} bytes for a file of {size:,}")
            if listing(Path(scratch)) != before:
                raise Wrong("wrote something")
        except Exception as error:
            return f"{family.name} {seed} ({what}): {type(error).__name__}: {error}"
    return None


def run_cases(families: tuple[Family, ...], seeds: range) -> list[str]:
    """Returns the problems in the cases of these seeds, for each family."""
    found = (run_case(family, seed) for family in families for seed in seeds)
    return [problem for problem in found if problem is not None]
