"""Tests of a base on disk: the same bits as in memory, packed once, and never from a damaged file."""

from __future__ import annotations

import copy
import itertools
import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lite import LoraConfig, QuantConfig, TrainConfig, add_lora_, export_merged, load_quantized, train
from qlora_lite.checkpoints import base_on_disk
from qlora_lite.errors import CheckpointError, ConfigError, QuantizationError
from qlora_lite.export.quantized import save_quantized
from qlora_lite.generation.repacked_codes import decode_copies
from qlora_lite.lora.adapters import adapter_parameters
from qlora_lite.offload import mapped_file
from qlora_lite.offload.disk_source import disk_source
from qlora_lite.offload.mapped_file import is_mapped
from qlora_lite.quantization.packed_weight import PackedWeight
from qlora_lite.system import locked

TOKENS = torch.arange(40).view(2, 20)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test, and tiny tensors that are worth mapping."""
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mapped_file, "LEAST_BYTES", 64)
    return tmp_path / "cache" / base_on_disk.FOLDER


@pytest.fixture(scope="module")
def folder(make_tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("plain"), layers=3)


def trained(model: Any, **settings: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    add_lora_(model, LoraConfig(rank=2, dropout=0.1))
    config = TrainConfig(**{"steps": 10, "learning_rate": 1e-2, **settings})
    losses = train(model, [{"input_ids": TOKENS, "labels": TOKENS}], config, progress=False).losses
    return losses, {name: value.detach().clone() for name, value in adapter_parameters(model).items()}


def same(one: tuple[list[float], dict[str, torch.Tensor]], other: tuple[list[float], dict[str, torch.Tensor]]) -> bool:
    return one[0] == other[0] and all(torch.equal(value, other[1][name]) for name, value in one[1].items())


CASES = {
    "nf4": (QuantConfig(), "full", 2),
    "one statistic a block": (QuantConfig("fp4", double_quant=False), "none", 1),
    "int8, and its ends": (QuantConfig("int8", embedding_format="int8"), "full", 1),
    "int8 ends": (QuantConfig(embedding_format="int8"), 1 << 20, 1),
    "unpacked": (QuantConfig("none"), "full", 1),
}


SAMPLE = ("nf4", "int8, and its ends")


@pytest.mark.parametrize(
    "case", [case if case in SAMPLE else pytest.param(case, marks=pytest.mark.matrix) for case in CASES]
)
def test_ten_steps_are_the_same_to_the_bit(folder: Path, case: str) -> None:
    config, checkpointing, accumulated = CASES[case]
    settings: dict[str, Any] = {"checkpointing": checkpointing, "gradient_accumulation": accumulated}
    on_disk = load_quantized(folder, config, base="disk")
    source = disk_source(on_disk)
    assert source is not None and len(source.block_bytes) == 3
    packed = [module for module in on_disk.modules() if isinstance(module, PackedWeight)]
    assert all(is_mapped(weight.packed) for weight in packed) and is_mapped(next(on_disk.parameters()))
    assert sum(source.block_bytes) + source.outside_bytes > sum(weight.packed.nbytes for weight in packed)
    assert all(weight.packed.data_ptr() % base_on_disk.ALIGNMENT == 0 for weight in packed)
    assert same(trained(on_disk, **settings), trained(load_quantized(folder, config), **settings))


def test_a_packed_folder_is_mapped_as_it_lies(folder: Path, cache: Path, tmp_path: Path) -> None:
    save_quantized(load_quantized(folder, QuantConfig()), tmp_path / "packed")
    on_disk = load_quantized(tmp_path / "packed", base="disk")
    assert is_mapped(on_disk.model.layers[0].mlp.up_proj.weight.packed) and is_mapped(on_disk.lm_head.weight)
    assert on_disk.lm_head.weight is on_disk.model.embed_tokens.weight and not cache.exists()
    assert same(trained(on_disk, steps=2), trained(load_quantized(folder, QuantConfig()), steps=2))


def test_stacks_of_experts(small_model: Callable[..., Any], tmp_path: Path) -> None:
    small_model("MixtralConfig").save_pretrained(tmp_path / "experts")
    on_disk = load_quantized(tmp_path / "experts", base="disk")
    assert torch.equal(on_disk(TOKENS).logits, load_quantized(tmp_path / "experts")(TOKENS).logits)
    assert (
        len({id(part) for part in on_disk.modules() if isinstance(part, PackedWeight) and is_mapped(part.packed)}) > 16
    )


def test_answers_and_exports_are_the_same(folder: Path, tmp_path: Path) -> None:
    files = []
    for base in ("memory", "disk"):
        model = load_quantized(folder, QuantConfig(), base=base)
        trained(model, steps=1)
        answer = model.generate(TOKENS[:1], max_new_tokens=4, do_sample=False)
        export_merged(model, tmp_path / base, dtype=torch.float16)
        with decode_copies(model) as taken:
            assert base == "memory" or taken == 0  # the copies would be in memory
        files.append((answer.tolist(), (tmp_path / base / "model.safetensors").read_bytes()))
    assert files[0] == files[1]


class Stopped(Exception):
    """Ends a run."""


class Batches:
    """The same batch without end; stops the run when it is asked for the one of this number."""

    def __init__(self, last: int | None = None) -> None:
        self._last = last

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for number in itertools.count():
            if number == self._last:
                raise Stopped
            yield {"input_ids": TOKENS, "labels": TOKENS}


def test_a_run_in_memory_is_resumed_on_disk(folder: Path, tmp_path: Path) -> None:
    def run(base: str, output: str, stop: int | None = None, resume: bool = False) -> bytes:
        model = load_quantized(folder, QuantConfig(), base=base)
        torch.manual_seed(0)
        add_lora_(model, LoraConfig(rank=2, dropout=0.1))
        config = TrainConfig(steps=4, save_steps=2, learning_rate=1e-2)
        train(model, Batches(stop), config, output_dir=tmp_path / output, resume=resume, progress=False)
        return (tmp_path / output / "adapter" / "adapter_model.safetensors").read_bytes()

    with pytest.raises(Stopped):
        run("memory", "stopped", stop=3)
    assert run("disk", "stopped", resume=True) == run("memory", "whole")


def test_it_is_packed_once_for_a_checkpoint_and_its_settings(folder: Path, cache: Path, tmp_path: Path) -> None:
    own = shutil.copytree(folder, tmp_path / "own")
    load_quantized(own, QuantConfig(), base="disk")
    (packed,) = cache.iterdir()
    written = (packed / base_on_disk.FILE).stat().st_mtime_ns
    load_quantized(own, QuantConfig(), base="disk")
    assert [*cache.iterdir()] == [packed] and (packed / base_on_disk.FILE).stat().st_mtime_ns == written
    load_quantized(own, QuantConfig(blocksize=128), base="disk")
    load_quantized(own, QuantConfig(), dtype=torch.float32, base="disk")
    assert len([*cache.iterdir()]) == 3
    os.utime(own / "model.safetensors", ns=(0, 0))  # perhaps with other values where no sample was taken
    load_quantized(own, QuantConfig(), base="disk")
    assert len([*cache.iterdir()]) == 4


@pytest.mark.parametrize("damage", ["cut", "changed", "info"])
def test_a_damaged_file_is_not_used(folder: Path, cache: Path, damage: str) -> None:
    load_quantized(folder, QuantConfig(), base="disk")
    (packed,) = cache.iterdir()
    file = packed / (base_on_disk.INFO_FILE if damage == "info" else base_on_disk.FILE)
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content[:-1] if damage == "cut" else content)
    with pytest.raises(CheckpointError, match=r" is damaged \(.*\); remove it, and the base is packed again$"):
        load_quantized(folder, QuantConfig(), base="disk")
    shutil.rmtree(packed)
    load_quantized(folder, QuantConfig(), base="disk")


def test_a_full_disk_leaves_nothing_behind(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, before[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot be written: File too large"):
            load_quantized(folder, QuantConfig(), base="disk")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 20, 1 << 20, 1000))  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="1,000 free; make room"):
        load_quantized(folder, QuantConfig(), base="disk")
    assert not [*cache.iterdir()]


def test_values_that_cannot_be_packed_are_named(folder: Path, cache: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    own = shutil.copytree(folder, tmp_path / "broken")
    tensors = load_file(own / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 1] = float("nan")
    save_file(tensors, own / "model.safetensors")
    with pytest.raises(QuantizationError, match=r"layers\.1\.mlp\.up_proj\.weight holds nan at index \(3, 1\)"):
        load_quantized(own, QuantConfig(), base="disk")
    assert not [*cache.iterdir()]


def test_what_would_hold_the_base_in_memory_is_refused_or_keeps_it_on_disk(folder: Path) -> None:
    model = load_quantized(folder, QuantConfig(), base="disk")
    with pytest.raises(ConfigError, match="whose base lies on disk cannot be copied"):
        copy.deepcopy(model)
    with pytest.raises(ConfigError, match=r"q_proj lies on disk, and would be packed anew into memory"):
        add_lora_(model, LoraConfig(rank=2, target_modules=["q_proj"], init_lora_weights="loftq:2"))
    logits = load_quantized(folder, QuantConfig()).to("cpu").half().bfloat16()(TOKENS).logits
    weight = model.to("cpu").half().bfloat16().model.layers[1].mlp.up_proj.weight
    assert is_mapped(weight.packed) and torch.equal(model(TOKENS).logits, logits)
    with pytest.raises(ConfigError, match=r"was written to, and the base lies on disk"):
        weight.packed.zero_()
        model(TOKENS)


def test_other_places_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="base must be memory or disk; got 'host'"):
        load_quantized(folder, base="host")
    with pytest.raises(ConfigError, match="computed with on a CPU: device must be cpu; got 'meta'"):
        load_quantized(folder, base="disk", device="meta")


def test_another_process_that_packs_is_waited_for(folder: Path, cache: Path, tmp_path: Path) -> None:
    load_quantized(folder, QuantConfig(), base="disk")
    (packed,) = cache.iterdir()
    made = shutil.copytree(packed, tmp_path / "made")
    shutil.rmtree(packed)
    loaded: list[Any] = []
    waiting = threading.Thread(target=lambda: loaded.append(load_quantized(folder, QuantConfig(), base="disk")))
    with locked(packed.with_name(f".{packed.name}.lock")):
        waiting.start()
        waiting.join(1)
        assert waiting.is_alive() and not packed.exists()
        shutil.copytree(made, packed)
    waiting.join()
    assert disk_source(loaded[0]) is not None
    assert (packed / base_on_disk.FILE).stat().st_mtime_ns == (made / base_on_disk.FILE).stat().st_mtime_ns
