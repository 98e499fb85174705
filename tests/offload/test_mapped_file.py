"""Tests of mapped files: their tensors, the memory that they take, and files that change."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.offload import mapped_file
from qlora_lite.offload.mapped_file import MappedFile, Span, is_mapped, mapped_spans, release

MIB = 1 << 20
# The kernel maps pages beside those that are asked for, where they are in memory already.
BESIDE = 4 * MIB


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(torch.arange(8 * MIB, dtype=torch.int32).numpy().tobytes())
    return path


def resident(path: Path) -> int:
    """The bytes of a file that count as this process's, as the kernel says."""
    found, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            here = line.endswith(str(path))
        elif here and first == "Rss:":
            found += int(line.split()[1]) << 10
    return found


def test_tensors_are_read_when_touched_and_let_go(path: Path) -> None:
    file = MappedFile(path)
    tensor = file.tensor(MIB, (MIB, 2), torch.int32)
    assert resident(path) == 0 and file.span_of(tensor[1]) == Span(MIB + 8, MIB + 16)
    file.fetch(Span(MIB, 9 * MIB))
    assert 8 * MIB <= resident(path) <= 8 * MIB + BESIDE
    assert torch.equal(tensor.view(-1), torch.arange(MIB // 4, MIB // 4 + 2 * MIB, dtype=torch.int32))
    release(tensor, torch.ones(3))
    assert resident(path) <= BESIDE
    assert int(tensor[-1, -1]) == MIB // 4 + 2 * MIB - 1  # read again


def test_only_tensors_of_the_file_lie_there(path: Path) -> None:
    file = MappedFile(path)
    tensor = file.tensor(0, (4,), torch.bfloat16)
    others = [torch.ones(4), torch.empty(4, device="meta"), torch.empty(0), tensor.clone()]
    assert [found[0] is tensor for found in mapped_spans([*others, tensor])] == [True]
    assert is_mapped(torch.nn.Parameter(tensor)) and not any(map(is_mapped, others))


def test_what_is_written_stays_in_memory(path: Path) -> None:
    before = path.read_bytes()
    MappedFile(path).tensor(0, (4,), torch.int32).fill_(7)
    assert path.read_bytes() == before


@pytest.mark.parametrize("change", ["cut", "written", "touched"])
def test_a_file_that_changes_is_an_error_before_it_is_touched(path: Path, change: str) -> None:
    file = MappedFile(path)
    span = Span(0, 32 * MIB)
    if change == "cut":
        os.truncate(path, MIB)
    elif change == "written":
        path.write_bytes(b"other")
    else:
        os.utime(path, ns=(0, 0))
    with pytest.raises(CheckpointError, match="weights was changed while it was in use; start again"):
        file.fetch(span)


def test_pages_that_cannot_be_read_are_an_error_and_no_signal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = MappedFile(path)
    os.truncate(path, MIB)
    monkeypatch.setattr(MappedFile, "check", lambda self: None)  # it was cut since
    with pytest.raises(CheckpointError, match=r"weights cannot be read: .*; check the disk"):
        file.fetch(Span(2 * MIB, 3 * MIB))


def test_a_file_that_is_removed_or_replaced_keeps_its_bytes(path: Path, tmp_path: Path) -> None:
    file = MappedFile(path)
    (tmp_path / "new").write_bytes(b"x" * 100)
    os.replace(tmp_path / "new", path)
    path.unlink()
    file.fetch(Span(0, MIB))
    assert int(file.tensor(400, (1,), torch.int32)) == 100


def test_what_cannot_be_mapped_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").touch()
    for name, reason in (("empty", "cannot mmap an empty file"), ("none", "No such file or directory")):
        with pytest.raises(CheckpointError, match=f"{name} cannot be mapped: {reason}"):
            MappedFile(tmp_path / name)
    monkeypatch.setattr(mapped_file, "c_function", lambda name: None)
    with pytest.raises(ConfigError, match="needs madvise"):
        MappedFile(tmp_path / "none")


def test_kernels_without_populate_are_asked_to_read_ahead(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_file, "POPULATE_READ", 1000)  # unknown advice: EINVAL, as on an older kernel
    file = MappedFile(path)
    file.fetch(Span(0, MIB))
    assert int(file.tensor(400, (1,), torch.int32)) == 100
