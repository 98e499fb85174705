"""Tests of forecasts from a few layers against rehearsals of all layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_lite import LoraConfig, QuantConfig, TrainConfig
from qlora_lite.errors import ConfigError
from qlora_lite.offload import base_bytes
from qlora_lite.planning.forecast import FEWEST_LAYERS, VERIFIED_LAYERS, Forecaster, TrainingSetup, layer_count
from qlora_lite.planning.rehearsal import fake_tensors, rehearsal
from qlora_lite.planning.training_rehearsal import build_fake_model, read_config, run_fake_training

LAYERS = 6


@pytest.fixture(scope="module")
def deep_config(make_tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return read_config(make_tiny_model(tmp_path_factory.mktemp("deep"), layers=LAYERS))


def rehearsed_whole(found: Any, wanted: TrainingSetup, accelerator: bool) -> int:
    """Returns the peak over two steps, rehearsed with all layers."""
    config = TrainConfig(
        steps=2,
        optimizer=wanted.optimizer,
        checkpointing=wanted.checkpointing,
        gradient_accumulation=2 if wanted.accumulated else 1,
    )
    with rehearsal(accelerator) as profiler:
        model = build_fake_model(found, wanted.quant, wanted.lora, profiler)
        run_fake_training(model, profiler, config, wanted.rows, wanted.tokens)
    assert profiler.trace is not None
    return profiler.trace.peak()[0]


# Among the first two stand both devices, both ends of checkpointing, a packed and a plain base; `make endure` runs all.
CASES: list[Any] = [
    (TrainingSetup(QuantConfig(), LoraConfig(4), 2, 24), True),
    (TrainingSetup(QuantConfig("none"), LoraConfig(4), 5, 16, checkpointing="none", accumulated=True), False),
]
MORE_CASES = [
    (TrainingSetup(QuantConfig(), LoraConfig(4), 2, 24), False),
    (TrainingSetup(QuantConfig(), LoraConfig(2), 3, 200, checkpointing="none"), True),
    (TrainingSetup(QuantConfig("int8", embedding_format="int8"), LoraConfig(8), 1, 40, "adamw8bit"), True),
    (TrainingSetup(QuantConfig("fp4", double_quant=False), LoraConfig(64), 1, 2), True),
]
CASES += [pytest.param(*case, marks=pytest.mark.matrix) for case in MORE_CASES]


@pytest.mark.parametrize(("wanted", "accelerator"), CASES)
def test_a_few_layers_predict_the_peak_of_all_to_the_byte(
    deep_config: Any, wanted: TrainingSetup, accelerator: bool
) -> None:
    with fake_tensors(accelerator):
        forecasts = Forecaster(deep_config, accelerator)
        found = forecasts.forecast(wanted)
    assert not forecasts.rehearses_all_layers and found.layers == (FEWEST_LAYERS, FEWEST_LAYERS + 1)
    assert found.peak == sum(found.by_category.values()) == rehearsed_whole(deep_config, wanted, accelerator)
    assert (found.reserved is not None) == accelerator


@pytest.mark.parametrize("layer", [2, 5])
def test_a_layer_unlike_the_others_is_noticed(deep_config: Any, layer: int) -> None:
    assert layer_count(deep_config) == LAYERS > VERIFIED_LAYERS
    wanted = TrainingSetup(QuantConfig(), LoraConfig(4, rank_pattern={f"layers.{layer}.mlp.up_proj": 64}), 2, 24)
    with fake_tensors():
        forecasts = Forecaster(deep_config, False)
        found = forecasts.forecast(wanted)
    assert found.layers == (LAYERS,) and found.peak == rehearsed_whole(deep_config, wanted, False)


def test_a_byte_budget_is_rehearsed_with_all_layers(deep_config: Any) -> None:
    wanted = TrainingSetup(QuantConfig(), LoraConfig(4), 2, 64, checkpointing=4 << 20)
    with fake_tensors():
        found = Forecaster(deep_config, False).forecast(wanted)
    assert found.layers == (LAYERS,) and found.peak == rehearsed_whole(deep_config, wanted, False)
    assert json.dumps(found.to_json())


def test_a_base_on_disk_takes_its_resident_part(deep_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_bytes, "LEAST_BYTES", 64)  # the tensors of a tiny model are large enough then
    wanted = TrainingSetup(QuantConfig(), LoraConfig(4), 2, 24)
    with fake_tensors():
        forecasts = Forecaster(deep_config, False)
        memory, disk = (forecasts.forecast(replace(wanted, base=base)) for base in ("memory", "disk"))
    assert 0 < disk.resident_base < disk.on_disk < disk.read_a_batch and memory.on_disk == 0
    assert memory.peak - disk.peak == memory.model_bytes - disk.model_bytes == disk.on_disk - disk.resident_base
    assert disk.peak == sum(disk.by_category.values()) and min(disk.by_category.values()) >= 0
    with fake_tensors(True), pytest.raises(ConfigError, match=r"on disk is computed with on a CPU; plan for one"):
        Forecaster(deep_config, True).forecast(replace(wanted, base="disk"))
