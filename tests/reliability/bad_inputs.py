"""Bad files and their readers: what reading one may do. Run by endure.py and by the tests.

A case goes wrong unless its reader either raises an error of ours, or gives what an independent reader of the format
gives; within a second, within 2 x the file + 200 MiB of memory, and without writing anything.
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
    """What a reader must not do."""


class _TooLong(BaseException):
    """Not an Exception, so that nothing on the way takes it for a bad file's."""


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
        raise Wrong(f"read what safetensors refuses: {error}") from error
    if not _equal(ours, theirs):
        raise Wrong("read other values than safetensors does")


def _read_index(folder: Path) -> None:
    try:
        found = dict(TensorFiles(folder).items())
    except QLoRAError:
        return
    good = bad_files.good_tensors()
    if not found.keys() <= good.keys() or not _equal(found, {name: good[name] for name in found}):
        raise Wrong("read tensors that no shard of the folder holds")
    if found.keys() != (listed := json.loads((folder / bad_files.INDEX).read_text())["weight_map"]).keys():
        raise Wrong(f"read {sorted(found)} where the index lists {sorted(listed)}")


def adaptable() -> nn.Module:
    """A small model with layers that adapters go to."""
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
            raise Wrong(f"{name} took values that are not finite")
        if not torch.equal(layer.lora_A, stored[f"base_model.model.{name}.lora_A.weight"]):
            raise Wrong(f"{name} has another A than the file")


def _read_records(folder: Path) -> None:
    try:
        found = read_records(folder / bad_files.RECORDS)
    except QLoRAError:
        return
    lines = [line for line in (folder / bad_files.RECORDS).read_bytes().decode("utf-8-sig").split("\n") if line.strip()]
    if found != [json.loads(line) for line in lines]:
        raise Wrong("read other records than the lines hold")


def _read_checkpoint(folder: Path) -> None:
    try:
        model = load_quantized(folder, QuantConfig())
    except QLoRAError:
        return
    held = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    if bad := [name for name, value in held.items() if not value.isfinite().all()]:
        raise Wrong(f"loaded NaN or infinity in {bad[:3]}")
    if any(value.is_meta for value in model.state_dict().values()):
        raise Wrong("left weights out")


@dataclass(frozen=True)
class Family:
    """damage: writes one case into an empty folder, and says what it did; read: reads it, and raises Wrong."""

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
    """Most resident bytes of this process since `_restart_peak` (proc(5), VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise OSError("the kernel does not tell VmHWM")


def _restart_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    found = {path: path.lstat() for path in folder.rglob("*")}
    return {str(path): (state.st_size, state.st_mtime_ns) for path, state in found.items()}


def run_case(family: Family, seed: int) -> str | None:
    """None if all is well with the case of this seed, else what went wrong, beginning with the family and the seed."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "input"
        folder.mkdir()
        what = family.damage(folder, random.Random(f"{family.name} {seed}"))
        before = listing(Path(place))
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file() and not path.is_symlink())
        resident = _restart_peak()
        try:
            with limited(SECONDS):
                family.read(folder)
            if (taken := _peak() - resident) > 2 * size + SPARE_BYTES:
                raise Wrong(f"took {taken:,} bytes for a file of {size:,}")
            if listing(Path(place)) != before:
                raise Wrong("wrote something")
        except Exception as error:
            return f"{family.name} {seed} ({what}): {type(error).__name__}: {error}"
    return None


def run_cases(families: tuple[Family, ...], seeds: range) -> list[str]:
    """What went wrong in the cases of these seeds, of each family."""
    found = (run_case(family, seed) for family in families for seed in seeds)
    return [problem for problem in found if problem is not None]
