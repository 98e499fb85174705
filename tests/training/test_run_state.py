"""Tests of resuming: equal bit for bit to an uninterrupted run; another base, data or machine is refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from qlora_lite import LoraConfig, QuantConfig, TrainConfig, add_lora_, load_quantized, quantize_base_, train
from qlora_lite.checkpoints.safetensors_read import read_safetensors
from qlora_lite.choices import DEFAULTS, with_overrides
from qlora_lite.errors import CheckpointError
from qlora_lite.lora.variants import set_reference_
from qlora_lite.training.loop import TrainResult
from qlora_lite.training.run_state import base_fingerprint

Files = dict[str, dict[str, torch.Tensor]]


def adapted(folder: Path, format: str = "nf4", dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    model = load_quantized(folder, QuantConfig(format=format), dtype=dtype)
    torch.manual_seed(1)
    add_lora_(model, LoraConfig(**{"rank": 4, "alpha": 8, "dropout": 0.1, **lora}))
    return model


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Batches of different lengths."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(100, (1, 8 + n % 3), generator=generator) for n in range(count)]
    return [{"input_ids": row, "labels": row} for row in tokens]


def shuffled(count: int) -> Any:
    generator = torch.Generator().manual_seed(3)
    return DataLoader(rows(count), batch_size=None, shuffle=True, generator=generator)  # type: ignore[arg-type]


BATCHES = {
    "list": lambda: rows(5),
    "iterator": lambda: iter(rows(12)),
    "loader": lambda: shuffled(5),
    "global": lambda: DataLoader(rows(5), batch_size=None, shuffle=True),  # type: ignore[arg-type]
}


def end_of(run: Path, step: int = 6) -> tuple[Files, list[float], Any]:
    """Tensors, losses and the rest of the state in the checkpoint of a step."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    tensors = {path.name: read_safetensors(path) for path in sorted(folder.rglob("*.safetensors"))}
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return tensors, losses, json.loads((folder / "state.json").read_text())


def back_to(run: Path, other: Path, step: int) -> Path:
    """A copy of a run's folder as it was when its checkpoint of this step was the last."""
    shutil.copytree(run, other)
    for path in (other / "checkpoints").iterdir():
        if path.name > f"step-{step:06d}":
            shutil.rmtree(path)
    return other


def assert_same(one: tuple[Files, list[float], Any], other: tuple[Files, list[float], Any]) -> None:
    assert one[1] == other[1] and one[2] == other[2]
    assert one[0].keys() == other[0].keys() and len(one[0]) == 4
    for file, tensors in one[0].items():
        assert tensors.keys() == other[0][file].keys() and tensors
        assert all(torch.equal(value, other[0][file][name]) for name, value in tensors.items()), file


@pytest.mark.parametrize(
    ("batches", "lora", "settings", "base"),
    [
        ("list", {}, {"gradient_accumulation": 2}, {}),
        ("loader", {"variant": "dora"}, {"checkpointing": "none"}, {"format": "int8"}),
        (
            "global",
            {"rank": 32, "init_lora_weights": "pissa"},
            {"optimizer": "adamw8bit", "checkpointing": 1_200_000},
            {},
        ),
        (
            "iterator",
            {"adapter_dtype": torch.bfloat16},
            {"gradient_accumulation": 2, "neftune_noise_alpha": 5.0, "schedule": "linear", "min_learning_rate": 1e-3},
            {},
        ),
    ],
)
def test_resumed_equals_uninterrupted(
    tiny_folder: Path,
    memory_path: Path,
    batches: str,
    lora: dict[str, Any],
    settings: dict[str, Any],
    base: dict[str, Any],
) -> None:
    config = TrainConfig(steps=6, learning_rate=1e-2, save_steps=2, keep_last=None, **settings)
    whole = memory_path / "whole"
    result = train(adapted(tiny_folder, **base, **lora), BATCHES[batches](), config, output_dir=whole, progress=False)
    for step in (2, 4):
        again = back_to(whole, memory_path / f"from{step}", step)
        torch.manual_seed(step)  # what happened to random numbers before makes no difference
        model = adapted(tiny_folder, **base, **lora)
        resumed = train(model, BATCHES[batches](), config, output_dir=again, resume=True, progress=False)
        assert resumed.resumed_from == again / "checkpoints" / f"step-{step:06d}" and not resumed.skipped
        assert resumed.losses == result.losses and [line.step for line in resumed.steps] == [1, 2, 3, 4, 5, 6]
        assert_same(end_of(whole), end_of(again))
        lines = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()] for run in (whole, again)]
        assert lines[0] == lines[1] == result.losses
        finals = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (whole, again)]
        assert finals[0] == finals[1]


def test_a_run_goes_on_with_the_choices_that_it_began_with(
    tiny_folder: Path, memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, torchs = TrainConfig(steps=2, learning_rate=1e-2, save_steps=1, keep_last=None), "attention_forward=torch"
    runs, ends = {}, {}

    def made(**words: Any) -> TrainResult:
        return train(adapted(tiny_folder, dtype=torch.bfloat16), rows(5), config, progress=False, **words)

    for name, choices in {"torch": f"default,{torchs},attention_backward=torch", "default": "default"}.items():
        monkeypatch.setenv("QLORA_LITE_CHOICES", choices)
        runs[name] = made(output_dir=memory_path / name)
        ends[name] = end_of(memory_path / name, 2)
        assert ends[name][2]["facts"]["choices"] == dict(runs[name].choices)
    assert runs["torch"].choices == with_overrides(DEFAULTS, f"{torchs},attention_backward=torch")
    assert runs["torch"].losses != runs["default"].losses == pytest.approx(runs["torch"].losses, rel=1e-2)
    for name, table in {"torch": "default", "default": f"default,{torchs}"}.items():  # now the table is another
        monkeypatch.setenv("QLORA_LITE_CHOICES", table)
        again = back_to(memory_path / name, memory_path / f"{name} again", 1)
        resumed = made(output_dir=again, resume=True)
        assert resumed.choices == runs[name].choices
        assert_same(ends[name], end_of(again, 2))


def test_another_run_is_refused_with_every_difference(tiny_folder: Path, memory_path: Path) -> None:
    config = TrainConfig(steps=2, save_steps=1)
    train(adapted(tiny_folder), rows(5), config, output_dir=memory_path / "run", progress=False)
    before = sorted((path, path.stat().st_mtime_ns) for path in (memory_path / "run").rglob("*") if path.is_file())

    def refused(message: str, model: Any, batches: Any, settings: TrainConfig = config) -> None:
        with pytest.raises(CheckpointError, match=message):
            train(model, batches, settings, output_dir=memory_path / "run", resume=True, progress=False)

    other = TrainConfig(steps=2, save_steps=2, keep_best=1, learning_rate=1e-3, seed=1)
    refused(
        "learning_rate was 0.0002 and is 0.001; seed was 0 and is 1; restore these",
        adapted(tiny_folder),
        rows(5),
        other,
    )
    refused("the adapter of model.layers.0.mlp.down_proj was", adapted(tiny_folder, rank=2), rows(5))
    refused("the base has other layout; the base has other values", adapted(tiny_folder, "fp4"), rows(5))
    changed = adapted(tiny_folder)
    changed.model.layers[0].mlp.up_proj.base_layer.weight.packed[0] ^= 1
    refused("exactly: the base has other values; restore", changed, rows(5))
    refused("an epoch had 5 batches, and has 4 here", adapted(tiny_folder), rows(4))
    refused("first 2 batches of epoch 1 are not those", adapted(tiny_folder), rows(5)[::-1])
    refused(
        "random numbers of the run came from torch; here they come from generator.0", changed_back(changed), shuffled(5)
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        refused(f"machine: threads was {threads} and is {threads + 1}", adapted(tiny_folder), rows(5))
    finally:
        torch.set_num_threads(threads)
    assert before == sorted(
        (path, path.stat().st_mtime_ns) for path in (memory_path / "run").rglob("*") if path.is_file()
    )


def changed_back(model: Any) -> Any:
    model.model.layers[0].mlp.up_proj.base_layer.weight.packed[0] ^= 1
    return model


def packed_layers() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64, bias=False))
    quantize_base_(layers, QuantConfig("int8"))
    add_lora_(layers, LoraConfig(rank=2, target_modules="all-linear"))
    return layers


def test_sums_tell_what_changed_and_do_not_see_adapters() -> None:
    base, one = base_fingerprint(packed_layers()), packed_layers()
    nn.init.normal_(one[0].lora_B)
    set_reference_(one[0])
    assert base_fingerprint(one) == base and set(base) == {"layout", "values", "config"}
    bit, fact, column = copy.deepcopy(one), copy.deepcopy(one), copy.deepcopy(one)
    bit[2].base_layer.weight.packed[63, 63] ^= 1
    fact[0].base_layer.weight.int8_activations = True
    for changed, name in ((bit, "values"), (fact, "layout")):
        assert {key for key, value in base_fingerprint(changed).items() if value != base[key]} == {name}
    weight = column[1].weight.detach()
    column[1].weight = nn.Parameter(torch.stack((weight, weight), 1)[:, 0], requires_grad=False)  # not contiguous
    assert base_fingerprint(column) == base
