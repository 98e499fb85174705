"""Files: readable by safetensors, whole or absent, and never from outside the folder."""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from qlora_lite.checkpoints import safetensors_write
from qlora_lite.checkpoints.atomic_folder import check_apart, locked, new_folder
from qlora_lite.checkpoints.files import read_json
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


def test_new_folder_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(KeyError), new_folder(target) as folder:
        (folder / "half").write_text("x")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with new_folder(target) as folder:
        (folder / "whole.json").write_text("x")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o777 & ~umask
    with pytest.raises(CheckpointError, match="not empty"), new_folder(target):
        pass
    with new_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("x")
    assert [path.name for path in target.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [target]
    with pytest.raises(CheckpointError, match="would be lost: new"), new_folder(target, overwrite=True):
        pass


@pytest.mark.parametrize("system", [safetensors_write.exchanged, lambda one, other: False])
def test_what_is_replaced_is_there_until_the_new_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: Callable[[Path, Path], bool]
) -> None:
    monkeypatch.setattr(safetensors_write, "exchanged", system)
    for text in ("1", "2"):
        with new_folder(tmp_path / "out", overwrite=True) as folder:
            (folder / "x.json").write_text(text)
    assert (tmp_path / "out" / "x.json").read_text() == "2" and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_holds_is_not(tmp_path: Path) -> None:
    for name in (".out.old1.partial", ".out.held1.partial", ".out.new1.partial", ".other.old1.partial"):
        (tmp_path / name).mkdir()
    for name in (".out.old1.partial", ".out.held1.partial", ".other.old1.partial"):
        os.utime(tmp_path / name, (0, 0))
    with locked(tmp_path / ".out.held1.partial"), new_folder(tmp_path / "out"):
        pass
    left = [".other.old1.partial", ".out.held1.partial", ".out.new1.partial", "out"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_what_another_one_wrote_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    refused = pytest.raises(CheckpointError, match="not empty")
    with refused, new_folder(tmp_path / "out"), new_folder(tmp_path / "out") as first:
        (first / "config.json").write_text("first")
    assert (tmp_path / "out" / "config.json").read_text() == "first"
    with pytest.raises(CheckpointError, match="would be lost: notes"), new_folder(tmp_path / "out", overwrite=True):
        (tmp_path / "out" / "notes").write_text("mine")
    assert (tmp_path / "out" / "notes").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_the_folder_hands_its_parents_group_on(tmp_path: Path) -> None:
    tmp_path.chmod(0o2775)
    with new_folder(tmp_path / "out"):
        pass
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_behind_a_link_the_folder_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for link, target in (("link", "real"), ("dangling", "later")):
        (tmp_path / link).symlink_to(target)
        with new_folder(tmp_path / link) as folder:
            (folder / "x.json").write_text("{}")
        assert (tmp_path / link).is_symlink() and (tmp_path / target / "x.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "later", "link", "real"]


def test_an_output_over_an_input_is_refused(tmp_path: Path) -> None:
    check_apart(tmp_path / "out", tmp_path / "base", None)
    with pytest.raises(CheckpointError, match="would replace the input"):
        check_apart(tmp_path, tmp_path / "base")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "model.safetensors").touch()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "model.safetensors").symlink_to(tmp_path / "store" / "model.safetensors")
    with pytest.raises(CheckpointError, match="store would replace the input"):
        check_apart(tmp_path / "store", tmp_path / "linked")


def test_damaged_json_gets_one_sentence(tmp_path: Path) -> None:
    for text, message in (
        ("[1]", "JSON object"),
        ("{", "cannot be read as JSON"),
        ('{"r": ' + 5000 * "9" + "}", "cannot be read as JSON: Exceeds the limit"),
    ):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_json(tmp_path / "x.json")
