"""Tests of torch's record of allocations on an accelerator."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.memory import snapshot
from qlora_lite.memory.snapshot import memory_snapshot


def test_without_a_cuda_device_it_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="CUDA devices only, and none is available"), memory_snapshot(tmp_path / "s"):
        pytest.fail("nothing is run")


def test_the_recorder_is_started_dumped_and_stopped_even_if_the_block_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said: list[object] = []
    recorder = SimpleNamespace(
        _record_memory_history=lambda **options: said.append(options), _dump_snapshot=lambda path: said.append(path)
    )
    monkeypatch.setattr(snapshot, "_recorder", lambda: recorder)
    with pytest.raises(KeyError), memory_snapshot(tmp_path / "s"):
        raise KeyError
    assert said == [{"max_entries": snapshot.MAX_ENTRIES}, str(tmp_path / "s"), {"enabled": None}]
    (tmp_path / "there").touch()
    for path, why in (("there", "exists"), ("missing/s", "is not a writable folder")):
        with pytest.raises(CheckpointError, match=why), memory_snapshot(tmp_path / path):
            pytest.fail("nothing is run")


@pytest.mark.gpu
def test_the_file_names_what_was_allocated(tmp_path: Path) -> None:
    with memory_snapshot(tmp_path / "s.pickle"):
        torch.empty(1 << 20, device="cuda")
    assert (tmp_path / "s.pickle").stat().st_size > 1000
