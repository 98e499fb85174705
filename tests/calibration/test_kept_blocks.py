"""Tests of a calibration that is stopped: it goes on with the blocks that are packed, to the same bytes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lite import load_quantized
from qlora_lite.calibration import block_packing, calibrate
from qlora_lite.calibration.from_checkpoint import unfinished_folder
from qlora_lite.calibration.kept_blocks import KEY_FILE, KeptBlocks
from qlora_lite.errors import CheckpointError, Stopped

Rows = Callable[..., list[dict[str, torch.Tensor]]]


@pytest.fixture
def packed_layers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of weights that feedback packs. Packing those of block 1 is stopped by a signal, once."""
    names: list[str] = []
    own, stops = block_packing.pack_with_feedback, [True]

    def counted(weight: Any, products: Any, order: Any, config: Any, format: str, name: str) -> Any:
        if "layers.1." in name and stops:
            stops.pop()
            raise Stopped(signal.SIGINT, "stopped by SIGINT; nothing is left half-written")
        names.append(name)
        return own(weight, products, order, config, format, name)

    monkeypatch.setattr(block_packing, "pack_with_feedback", counted)
    return names


def test_it_goes_on_to_the_bytes_of_one_that_was_not_stopped(
    tiny_folder: Path, calibrated: tuple[Path, Any], random_rows: Rows, tmp_path: Path, packed_layers: list[str]
) -> None:
    folder, report = calibrated
    text, others = random_rows(6, 48, 100), random_rows(4, 48, 100, seed=1)
    kept = unfinished_folder(tmp_path / "out")
    with pytest.raises(Stopped, match=f"stopped by SIGINT.*; the same calibration goes on from {kept}") as stopped:
        calibrate(tiny_folder, tmp_path / "out", text, held_out=others)
    assert stopped.value.code == 130 and not (tmp_path / "out").exists()
    assert sorted(path.name for path in kept.iterdir()) == ["0000.safetensors", KEY_FILE]
    assert len(packed_layers) == 7
    again = calibrate(tiny_folder, tmp_path / "out", text, held_out=others)
    assert len(packed_layers) == 14 and not kept.exists()
    before, after = (load_quantized(path).state_dict() for path in (folder, tmp_path / "out"))
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    one, other = report.to_json(), again.to_json()
    assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_blocks_of_another_calibration_are_not_taken(
    tiny_folder: Path, random_rows: Rows, tmp_path: Path, packed_layers: list[str]
) -> None:
    with pytest.raises(Stopped):
        calibrate(tiny_folder, tmp_path / "out", random_rows(4, 32, 100))
    calibrate(tiny_folder, tmp_path / "out", random_rows(4, 32, 100, seed=5))
    assert len(packed_layers) == 7 + 14


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    kept = KeptBlocks(tmp_path / "kept", {"a": 1})
    assert kept.read(0) is None
    kept.write(0, {})
    assert kept.read(0) == {}
    (tmp_path / "kept" / "0000.safetensors").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=r"0000\.safetensors"):
        kept.read(0)
    KeptBlocks(tmp_path / "kept", {"a": 1}).open()
    assert (tmp_path / "kept").is_dir()
    KeptBlocks(tmp_path / "kept", {"a": 2}).open()
    assert not (tmp_path / "kept").exists()
