"""Tests of loading a base in shares: the bytes of the whole base, from the bytes of the files read once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lite import QuantConfig, load_quantized
from qlora_lite.errors import ConfigError
from qlora_lite.export.quantized import save_quantized

LOAD = """
import json, sys
import torch
from qlora_lite import QuantConfig, load_quantized
from qlora_lite.checkpoints import load, safetensors_read
from qlora_lite.sharding.base import sharded_base, whole_tensor

counted, of_file, load_tensors = [0], safetensors_read.StoredTensor._read, load.load_tensors_

def read(self, offset, shape):
    found = of_file(self, offset, shape)
    counted[0] += found.nbytes
    return found

def from_here(*arguments):  # the identity of the checkpoint is a sample, and small
    counted[0] = 0
    load_tensors(*arguments)

safetensors_read.StoredTensor._read, load.load_tensors_ = read, from_here
found = {}
for name, (folder, words) in json.loads(sys.argv[1]).items():
    config = None if words is None else QuantConfig(**words)
    model = load_quantized(folder, config, shard=True)
    base, own_read = sharded_base(model), counted[0]
    whole = load_quantized(folder, config)
    wanted = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    gathered = {name: whole_tensor(model, name) for name in names}
    same = [gathered[name].dtype == wanted[name].dtype and torch.equal(gathered[name], wanted[name]) for name in names]
    share = base.own_bytes / base.nbytes
    found[name] = {"names": names == list(wanted), "equal": all(same), "read": own_read, "share": share}
    base.empty()
print(json.dumps(found))
"""

BROKEN = """
import json, os, sys
from qlora_lite import QuantConfig, load_quantized
from qlora_lite.errors import QLoRAError
try:
    # Given two block sizes, each process takes one.
    load_quantized(sys.argv[1], QuantConfig(blocksize=int(sys.argv[-1 - int(os.environ["RANK"])])), shard=True)
except QLoRAError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


def file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("**/*.safetensors"))


def test_shares_together_are_the_whole_base_and_the_files_are_read_once(
    make_tiny_model: Callable[..., Path], run_processes: Callable[..., list[Any]], tmp_path: Path
) -> None:
    folder = make_tiny_model(tmp_path / "plain", layers=2, hidden=512)
    packed = tmp_path / "packed"
    save_quantized(load_quantized(folder, QuantConfig(embedding_format="int8")), packed)
    words = {"nf4": {}, "fp4": {"format": "fp4", "double_quant": False, "embedding_format": "int8"}}
    words |= {"int8": {"format": "int8"}}
    cases = {name: (str(folder), case) for name, case in words.items()} | {"packed": (str(packed), None)}
    ranks = run_processes(3, LOAD, tmp_path, json.dumps(cases))
    for name, (of, _) in cases.items():
        found = [rank[name] for rank in ranks]
        assert all(one["names"] and one["equal"] for one in found), name
        assert all(one["share"] == pytest.approx(1 / 3, rel=0.01) for one in found), name
        assert sum(one["read"] for one in found) <= 1.02 * file_bytes(Path(of)), name
        assert max(one["read"] for one in found) <= 0.36 * file_bytes(Path(of)), name


def test_bad_values_in_one_share_are_told_by_all(
    make_tiny_model: Callable[..., Path], run_processes: Callable[..., list[Any]], tmp_path: Path
) -> None:
    folder = make_tiny_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] = torch.nan  # in the share of the last process alone
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for kind, text in run_processes(2, BROKEN, tmp_path, folder, 64, 64):
        assert kind == "QuantizationError" and "model.layers.1.mlp.up_proj.weight holds nan at index (127, 63)" in text
    for kind, text in run_processes(2, BROKEN, tmp_path, folder, 64, 128):
        assert kind == "ConfigError" and "process 1 of 2 has another packing than process 0" in text


def test_a_process_alone_is_refused(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="a base in shares needs several processes: start them by torchrun"):
        load_quantized(tiny_folder, shard=True)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match="needs several processes; got one"):
        load_quantized(tiny_folder, shard=True)
