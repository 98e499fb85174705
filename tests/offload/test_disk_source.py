"""Tests of a base in mapped files: at most two blocks are resident, and nothing is lost or copied without a word."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.offload.disk_source import DiskSource, attach_disk_source_, disk_source
from qlora_lite.offload.mapped_file import MappedFile

MIB = 1 << 20
SIZE = 8 * MIB  # of a block
BESIDE = 4 * MIB  # as in test_mapped_file.py
BLOCKS = 6


class Layer(nn.Module):
    weight: Tensor

    def __init__(self, weight: Tensor, seen: Callable[[], None]) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.weight.sum()
        self.seen()
        return y


class Model(nn.Module):
    """Six layers of 8 MiB and a table of 16 MiB in a file, and a trained vector."""

    def __init__(self, path: Path, seen: Callable[[], None]) -> None:
        super().__init__()
        self.file = [MappedFile(path)]
        weights = [self.file[0].tensor(number * SIZE, (SIZE // 4,), torch.float32) for number in range(BLOCKS)]
        self.blocks = nn.ModuleList(Layer(weight, seen) for weight in weights)
        self.table = nn.Parameter(self.file[0].tensor(BLOCKS * SIZE, (SIZE // 2,), torch.float32), requires_grad=False)
        self.trained = nn.Parameter(torch.zeros(4))

    def forward(self) -> Tensor:
        x = self.trained + self.table.sum()
        for block in self.blocks:
            x = block(x)
        return x.sum()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(torch.ones((BLOCKS + 2) * SIZE // 4).numpy().tobytes())
    return path


@pytest.fixture
def resident(import_script: Callable[[str], Any]) -> Callable[[Path], int]:
    found: Callable[[Path], int] = import_script("tests/offload/test_mapped_file.py").resident
    return found


def test_two_blocks_are_resident_at_most(path: Path, resident: Callable[[Path], int]) -> None:
    sizes: list[int] = []
    model = Model(path, lambda: sizes.append(resident(path)))
    source = attach_disk_source_(model)
    assert source.block_bytes == [SIZE] * BLOCKS and source.outside_bytes == 2 * SIZE
    for _ in range(2):
        model().backward()
    assert float(model.trained.grad[0]) == 2 and len(sizes) == 2 * BLOCKS
    assert min(sizes) >= SIZE and max(sizes) <= 2 * SIZE + BESIDE
    with torch.no_grad():
        assert float(model()) == (BLOCKS + 2) * SIZE
    source.release()
    assert resident(path) <= BESIDE


def test_blocks_that_were_announced_and_did_not_come_are_let_go(path: Path, resident: Callable[[Path], int]) -> None:
    source = DiskSource(Model(path, lambda: None))
    source.arrive(0)
    source.next(1)
    source.leave(0)
    source.arrive(4)
    assert SIZE <= resident(path) <= SIZE + BESIDE


@pytest.mark.parametrize(
    "change",
    [lambda layer: layer.weight.add_(1), lambda layer: layer.load_state_dict({"weight": torch.zeros(SIZE // 4)})],
)
def test_a_weight_that_was_written_to_is_not_read_from_disk_again(path: Path, change: Callable[[Any], Any]) -> None:
    model = Model(path, lambda: None)
    attach_disk_source_(model)
    change(model.blocks[2])
    with pytest.raises(ConfigError, match=r"^blocks\.2\.weight was written to, and the base lies on disk"):
        model()


def test_a_file_that_changes_ends_the_pass(path: Path) -> None:
    model = Model(path, lambda: None)
    attach_disk_source_(model)
    loss = model()
    with open(path, "r+b") as file:
        file.truncate(MIB)
    for run in (loss.backward, model):
        with pytest.raises(CheckpointError, match="was changed while it was in use"):
            run()


def test_copies_are_refused(path: Path) -> None:
    model = Model(path, lambda: None)
    model.file.clear()  # as in a loaded model, its source holds the file
    assert disk_source(model) is None
    source = attach_disk_source_(Model(path, lambda: None))
    for make, what in ((copy.deepcopy, "cannot be copied"), (pickle.dumps, "cannot be pickled")):
        with pytest.raises(ConfigError, match=f"whose base lies on disk {what}"):
            make(source)


def test_casts_and_moves_keep_the_bytes_where_they_are(path: Path) -> None:
    model = Model(path, lambda: None)
    source = attach_disk_source_(model)
    before = model()
    assert torch.equal(model.to("cpu").train().eval().float()(), before)
    assert source is disk_source(model) and list(itertools.islice(source.block_bytes, 1)) == [SIZE]
