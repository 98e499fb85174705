"""The targets of fuzz_files.py: for each kind of file, a reader of bytes and an initial corpus.

A reader returns, or raises, which is a finding. Its input is one file, or two that are joined: the length of the first
(4 bytes, little endian), then both. All other files are sound.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import bad_files
from bad_inputs import FAMILIES, adaptable
from qlora_lite import LoraConfig, TrainConfig, add_lora_
from qlora_lite.compute.random_state import RandomSources
from qlora_lite.data.stream import BatchStream
from qlora_lite.errors import QLoRAError
from qlora_lite.lora.adapters import adapter_parameters
from qlora_lite.training.metrics import StepMetrics
from qlora_lite.training.optim import make_optimizer
from qlora_lite.training.run_checkpoints import (
    MANIFEST_FILE,
    METRICS_FILE,
    OPTIMIZER_FILE,
    RANDOM_FILE,
    STATE_FILE,
    TRAINED_FILE,
    checkpoint_path,
    newest_intact_checkpoint,
    write_checkpoint,
)
from qlora_lite.training.run_state import Run

Reader = Callable[[bytes], None]
SEEDS = 60
LENGTH_BYTES = 4
SOURCES = RandomSources(torch.device("cpu"))
# The file of a run's checkpoint that is replaced, by the first byte of the input.
RUN_FILES = (MANIFEST_FILE, STATE_FILE, METRICS_FILE, TRAINED_FILE, OPTIMIZER_FILE, RANDOM_FILE)


@dataclass(frozen=True)
class Target:
    """reader: makes a reader that uses an empty folder. seeds: returns the initial corpus, sound files first."""

    reader: Callable[[Path], Reader]
    seeds: Callable[[], list[bytes]]


def _joined(first: bytes, second: bytes) -> bytes:
    return len(first).to_bytes(LENGTH_BYTES, "little") + first + second


def _parted(data: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    return data[LENGTH_BYTES : LENGTH_BYTES + length], data[LENGTH_BYTES + length :]


def _of_family(number: int, *files: str) -> Callable[[Path], Reader]:
    """Returns the reader of one family of bad_inputs.py, for one file or for two joined ones."""

    def make(folder: Path) -> Reader:
        if files == (bad_files.INDEX,):
            bad_files.put_shards(folder)

        def read(data: bytes) -> None:
            parts = (data,) if len(files) == 1 else _parted(data)
            for file, part in zip(files, parts, strict=True):
                (folder / file).write_bytes(part)
            FAMILIES[number].read(folder)

        return read

    return make


def _damaged(damage: Callable[[Path, random.Random], str], *files: str) -> Iterator[bytes]:
    """Yields files damaged by bad_files.py."""
    for seed in range(SEEDS):
        with tempfile.TemporaryDirectory() as scratch:
            damage(Path(scratch), random.Random(seed))
            if all((Path(scratch) / file).is_file() for file in files):
                parts = [(Path(scratch) / file).read_bytes() for file in files]
                yield parts[0] if len(parts) == 1 else _joined(*parts)


def _header_seeds() -> list[bytes]:
    good = safetensors.torch.save(bad_files.good_tensors())
    return [good, *_damaged(bad_files.damage_safetensors, bad_files.TENSORS)]


def _index_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as scratch:
        good = json.dumps({"metadata": {}, "weight_map": bad_files.put_shards(Path(scratch))}).encode()
    return [good, *_damaged(bad_files.damage_index, bad_files.INDEX)]


def _adapter_seeds() -> list[bytes]:
    config, tensors = bad_files.good_adapter()
    good = _joined(json.dumps(config).encode(), safetensors.torch.save(tensors))
    return [good, *_damaged(bad_files.damage_adapter, bad_files.ADAPTER_CONFIG, bad_files.ADAPTER_TENSORS)]


def _record_seeds() -> list[bytes]:
    good = "\n".join(json.dumps(record) for record in bad_files.GOOD_RECORDS).encode()
    return [good, *_damaged(bad_files.damage_records, bad_files.RECORDS)]


def _stream() -> BatchStream:
    batches = [{"input_ids": torch.full((1, 3), n), "labels": torch.full((1, 3), n)} for n in range(3)]
    return BatchStream(batches, 9, SOURCES)


def fresh_run() -> Run:
    """Returns a run of a small model before its first step."""
    model = adaptable()
    add_lora_(model, LoraConfig(rank=2, dropout=0.0, target_modules=["first", "second"]))
    trained, config = adapter_parameters(model), TrainConfig(steps=4, save_steps=1)
    return Run(model, trained, make_optimizer(trained, config), config, _stream(), SOURCES)


def _step(run: Run) -> None:
    """Makes a step: batches, an update and its metrics."""
    list(run.stream.take(1, 1, 4))
    for parameter in run.trained.values():
        parameter.grad = torch.ones_like(parameter)
    run.optimizer.step()
    run.finish_step(StepMetrics(run.steps + 1, 1.0, 1.0, 1e-4, 3, 100.0, None))


@functools.cache
def sound_run() -> dict[str, bytes]:
    """Returns the files of a sound checkpoint by their paths in it."""
    run = fresh_run()
    _step(run)
    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoint_path(Path(scratch), 1)
        write_checkpoint(folder, run.write)
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _run_reader(run_folder: Path) -> Reader:
    """Returns a reader that resumes a run from a checkpoint with one file replaced.

    The manifest gets the sum of the new file, except where the manifest itself is replaced.
    """
    folder, good, run = checkpoint_path(run_folder, 1), sound_run(), fresh_run()
    shutil.rmtree(run_folder / "checkpoints", ignore_errors=True)
    for name, data in good.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    listed = json.loads(good[MANIFEST_FILE])["files"]

    def read(data: bytes) -> None:
        name = RUN_FILES[data[0] % len(RUN_FILES)] if data else MANIFEST_FILE
        (folder / name).write_bytes(data[1:])
        if name != MANIFEST_FILE:
            sums = {"bytes": len(data) - 1, "sha256": hashlib.sha256(data[1:]).hexdigest()}
            (folder / MANIFEST_FILE).write_text(json.dumps({"files": {**listed, name: sums}}))
        try:
            path, _ = newest_intact_checkpoint(run_folder)
            if path is not None:
                run.check_same(path)
                run.stream = _stream()
                run.restore_(path)
                run.restore_random()
        except QLoRAError:
            pass
        finally:
            for changed in {name, MANIFEST_FILE}:
                (folder / changed).write_bytes(good[changed])

    return read


def _run_seeds() -> list[bytes]:
    rng, good = random.Random(0), sound_run()
    seeds = [bytes([number]) + good[name] for number, name in enumerate(RUN_FILES)]
    for number, name in enumerate(RUN_FILES):
        damaged = (bad_files.damaged_text(good[name], rng) for _ in range(SEEDS // len(RUN_FILES)))
        seeds += [bytes([number]) + data for data in damaged]
    state: dict[str, Any] = json.loads(good[STATE_FILE])
    strange = ({**state, key: value} for key in state for value in (None, [], 1))
    return seeds + [bytes([RUN_FILES.index(STATE_FILE)]) + json.dumps(value).encode() for value in strange]


TARGETS = {
    "header": Target(_of_family(0, bad_files.TENSORS), _header_seeds),
    "index": Target(_of_family(1, bad_files.INDEX), _index_seeds),
    "adapter": Target(_of_family(2, bad_files.ADAPTER_CONFIG, bad_files.ADAPTER_TENSORS), _adapter_seeds),
    "records": Target(_of_family(3, bad_files.RECORDS), _record_seeds),
    "run": Target(_run_reader, _run_seeds),
}
