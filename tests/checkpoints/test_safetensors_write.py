"""Tests of writing safetensors folders: readable by safetensors, whole or absent, never outside the folder."""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from qlora_lite.checkpoints import safetensors_write
from qlora_lite.checkpoints.atomic_folder import new_folder
from qlora_lite.checkpoints.safetensors_read import TensorFiles, read_safetensors
from qlora_lite.checkpoints.safetensors_write import (
    INDEX_FILE,
    PlannedTensor,
    _Writer,
    planned,
    write_safetensors,
    write_sharded,
)
from qlora_lite.errors import CheckpointError


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = {f"t{n}": torch.randn(n + 1, 3).to(d) for n, d in enumerate([torch.float32, torch.bfloat16, torch.float16])}
    return {**made, "ints": torch.arange(5), "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", {name: planned(tensor) for name, tensor in tensors().items()})
    for read in (load_file(tmp_path / "x.safetensors"), read_safetensors(tmp_path / "x.safetensors")):
        assert read.keys() == tensors().keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors().items())


def test_shards_hold_the_same_as_one_file(tmp_path: Path) -> None:
    plan = {name: planned(tensor) for name, tensor in tensors().items()}
    files = write_sharded(tmp_path, plan, max_shard_bytes=30)
    assert len(files) > 2 and (tmp_path / INDEX_FILE).is_file()
    assert {name: tensor.tolist() for name, tensor in TensorFiles(tmp_path).items()} == {
        name: tensor.tolist() for name, tensor in tensors().items()
    }


def test_a_tensor_that_breaks_its_plan_stops_the_writing(tmp_path: Path) -> None:
    plan = {"a": PlannedTensor((2,), torch.float32, lambda: [torch.zeros(3)])}
    with pytest.raises(CheckpointError, match=r"a was planned as \(2,\)"):
        write_safetensors(tmp_path / "x.safetensors", plan)


Write = Callable[[int, memoryview], int]


def taking_all(write: Write, descriptor: int, block: memoryview) -> int:
    return write(descriptor, block)


def taking_part(write: Write, descriptor: int, block: memoryview) -> int:
    return write(descriptor, block[: max(1, len(block) // 3)])


def refusing_direct(write: Write, descriptor: int, block: memoryview) -> int:
    """A file system that takes the flag and then cannot do it."""
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
        raise OSError(errno.EINVAL, "Invalid argument")
    return write(descriptor, block)


@pytest.mark.parametrize("system", [taking_all, taking_part, refusing_direct])
@given(sizes=st.lists(st.integers(0, 20_000), min_size=1, max_size=6))
def test_every_byte_of_every_piece_is_written_in_order(
    tmp_path_factory: pytest.TempPathFactory, system: Callable[[Write, int, memoryview], int], sizes: list[int]
) -> None:
    path = tmp_path_factory.mktemp("pieces") / "x"
    pieces = [bytes([65 + number]) * size for number, size in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch, open(path, "wb", buffering=0) as file:
        patch.setattr(_Writer, "BLOCK_BYTES", 8192)
        patch.setattr(safetensors_write.os, "write", functools.partial(system, os.write))
        with _Writer(file) as writer:
            for piece in pieces:
                writer.write(piece)
    assert path.read_bytes() == b"".join(pieces)


def test_simulated_without_direct_writes_and_fcntl_the_bytes_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Writer, "BLOCK_BYTES", 4096)
    plan = {"a": planned(torch.arange(3000)), "b": planned(torch.randn(7, 100))}
    write_safetensors(tmp_path / "direct", plan)
    monkeypatch.setattr(safetensors_write, "O_DIRECT", 0)
    monkeypatch.setitem(sys.modules, "fcntl", None)  # importing it is an ImportError
    write_safetensors(tmp_path / "plain", plan)
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "direct").read_bytes()


def test_what_the_writing_thread_fails_at_is_raised_and_no_thread_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, block: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors_write.os, "write", full)
    monkeypatch.setattr(_Writer, "BLOCK_BYTES", 4096)
    before = threading.active_count()
    plan = {"w": PlannedTensor((8, 1024), torch.float32, lambda: torch.zeros(8, 1024).split(1))}
    with pytest.raises(CheckpointError, match="cannot be written: No space left"), new_folder(tmp_path / "out") as new:
        write_safetensors(new / "x.safetensors", plan)
    assert threading.active_count() == before and list(tmp_path.iterdir()) == []
