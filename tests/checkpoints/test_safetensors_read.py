"""Tests of reading safetensors folders, whole and by rows, never from outside the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qlora_lite.checkpoints import safetensors_read
from qlora_lite.checkpoints.lazy_tensors import read_slices
from qlora_lite.checkpoints.safetensors_read import TensorFiles, stored_tensors
from qlora_lite.checkpoints.safetensors_write import INDEX_FILE
from qlora_lite.errors import CheckpointError
from qlora_lite.memory.counters import reset_resident_peak, resident_bytes

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@given(rows=st.integers(1, 9), columns=st.integers(0, 5), largest=st.integers(1, 60), step=st.integers(1, 4))
def test_slices_are_the_tensor(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, largest: int, step: int
) -> None:
    path = tmp_path_factory.mktemp("slices") / "x.safetensors"
    tensors = {str(dtype): torch.randn(rows, columns).to(dtype) for dtype in DTYPES} | {"scalar": torch.tensor(3.0)}
    save_file(tensors, path)
    whole = load_file(path)
    for name, stored in stored_tensors(path).items():
        assert torch.equal(stored.read(), whole[name]) and stored.read().dtype == whole[name].dtype
        pieces = list(read_slices(stored, largest, step))
        assert torch.equal(torch.cat([piece for _, piece in pieces]) if stored.shape else pieces[0][1], whole[name])
        assert all(first % step == 0 for first, _ in pieces)


class Hesitant:
    """A file that gives at most seven bytes at a time."""

    def __init__(self, path: Path, mode: str, buffering: int) -> None:
        assert (mode, buffering) == ("rb", 0)
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed below
        self.seek, self.fileno = self._file.seek, self._file.fileno

    def __enter__(self) -> Hesitant:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def readinto(self, buffer: memoryview) -> int:
        return self._file.readinto(buffer[:7]) or 0


def test_every_byte_is_read_however_few_come_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.arange(40), "b": torch.randn(5, 9)}
    save_file(tensors, tmp_path / "x.safetensors")
    stored = stored_tensors(tmp_path / "x.safetensors")
    monkeypatch.setattr(safetensors_read, "open", Hesitant, raising=False)
    for name, tensor in tensors.items():
        assert torch.equal(stored[name].read(), tensor) and torch.equal(stored[name].rows(2, 4), tensor[2:4])


def test_what_was_read_does_not_stay_resident(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(192 << 20, 1, dtype=torch.uint8)}, tmp_path / "x.safetensors")
    stored = stored_tensors(tmp_path / "x.safetensors")["a"]
    if not reset_resident_peak():
        pytest.skip("this system does not count resident peaks")
    start = resident_bytes() or 0
    assert not any(piece.any() for _, piece in read_slices(stored, 1 << 20))
    assert (resident_bytes("VmHWM") or 0) - start < 64 << 20


def test_a_file_that_was_changed_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    stored = stored_tensors(path)["a"]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="was changed while it was in use"):
        stored.read()
    save_file({"a": torch.zeros(90), "b": torch.ones(10)}, path)  # as many bytes, and other ones behind "a"
    with pytest.raises(CheckpointError, match="was changed while it was in use"):
        stored.rows(90, 100)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        stored.read()


def test_beside_an_index_the_single_file_counts_as_it_does_for_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    small = LlamaConfig(vocab_size=9, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    model = AutoModelForCausalLM.from_config(small)
    model.save_pretrained(tmp_path, max_shard_size=100)
    with torch.no_grad():
        model.model.norm.weight.fill_(3)
    save_file({name: value.clone() for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).model.norm.weight
    assert torch.equal(TensorFiles(tmp_path).stored["model.norm.weight"].read(), theirs.detach())


def test_an_index_that_promises_more_than_there_is(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}))
    with pytest.raises(CheckpointError, match="should hold b by the index"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "x.bin", "", 3])
def test_index_may_only_name_plain_files(tmp_path: Path, name: object) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=r"not a plain \.safetensors file name"):
        TensorFiles(tmp_path)


def test_damaged_and_missing_files_get_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds neither .* nor model\.safetensors\.index\.json$"):
        TensorFiles(tmp_path)
    for name in ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "training_args.bin"):
        (tmp_path / name).write_bytes(b"\x80")
    with pytest.raises(
        CheckpointError,
        match=r"holds neither .*; pytorch_model-00001-of-00002\.bin, pytorch_model-00002-of-00002\.bin, and 1 more: "
        rf"pickles can run code and are not read; .*from_pretrained\('{tmp_path}'\)\.save_pretrained\('converted'\)",
    ):
        TensorFiles(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        TensorFiles(tmp_path)
