"""Tests of plans on a tiny model against rehearsals of fitting and of non-fitting batches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lite import LoraConfig, QuantConfig, TrainConfig
from qlora_lite.checkpoints.load import load_quantized
from qlora_lite.errors import ConfigError, RehearsalError
from qlora_lite.lora.adapters import adapter_parameters, add_lora_
from qlora_lite.planning.forecast import Forecaster, TrainingSetup
from qlora_lite.planning.memory_plan import (
    MAX_ROWS,
    DeviceMemory,
    checkpointing_within,
    largest_batch,
    largest_fitting,
    minimum_bytes,
    plan,
    usual_lengths,
)
from qlora_lite.planning.rehearsal import fake_tensors
from qlora_lite.planning.training_rehearsal import read_config, rehearse_steps

MIB = 1 << 20
WANTED = TrainingSetup(QuantConfig(), LoraConfig(4), 2, 32)


@pytest.fixture(scope="module")
def tiny_config(tiny_folder: Path) -> Any:
    return read_config(tiny_folder)


def rehearsed(folder: Path, wanted: TrainingSetup) -> int:
    config = TrainConfig(steps=2, checkpointing=wanted.checkpointing, optimizer=wanted.optimizer)
    report = rehearse_steps(folder, wanted.quant, wanted.lora, config, rows=wanted.rows, tokens=wanted.tokens)
    return max(phase.live_peak or 0 for phase in report.phases)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 10_000), st.integers(1, 6000))
def test_the_search_finds_the_last_that_fits(step: int, jump: int, size: int, first: int) -> None:
    def needed(rows: int) -> int:
        return 50 + step * (rows // jump)

    asked: list[int] = []

    def fits(rows: int) -> bool:
        asked.append(rows)
        return needed(rows) <= size

    found = largest_fitting(fits, needed, size, first)
    assert found == next((rows for rows in range(MAX_ROWS, 0, -1) if needed(rows) <= size), 0)
    assert len(asked) == len(set(asked)) < 40


@settings(max_examples=3)
@given(size=st.integers(300_000, 6_000_000), kind=st.sampled_from(["full", "none"]), tokens=st.sampled_from([16, 48]))
def test_the_largest_batch_fits_and_one_row_more_does_not(
    size: int, kind: str, tokens: int, tiny_folder: Path, tiny_config: Any
) -> None:
    wanted = replace(WANTED, checkpointing=kind)
    memory = DeviceMemory(size, 0, accelerator=False)
    with fake_tensors():
        found = largest_batch(Forecaster(tiny_config, False), wanted, memory, tokens)
    if found.rows:
        assert rehearsed(tiny_folder, replace(wanted, rows=found.rows, tokens=tokens)) <= size
    assert rehearsed(tiny_folder, replace(wanted, rows=found.rows + 1, tokens=tokens)) > size


def test_a_plan_has_the_effect_of_single_changes(tiny_folder: Path, tiny_config: Any) -> None:
    wanted = replace(WANTED, quant=QuantConfig("int8"), checkpointing="none")
    made = plan(tiny_config, wanted, DeviceMemory(4 * MIB, MIB, accelerator=False), [16])
    assert made.fits and made.forecast is not None and made.needed == made.forecast.peak + MIB
    assert made.least is not None and made.least.checkpointing == "none"
    changes = {alternative.change: alternative.difference for alternative in made.alternatives}
    assert list(changes) == [
        "int8 embedding and head",
        "nf4 in place of int8",
        "adamw8bit",
        "checkpointing full",
        "base on disk",
        "rank 2 in place of 4",
    ]
    before = rehearsed(tiny_folder, wanted)
    assert changes["checkpointing full"] == rehearsed(tiny_folder, replace(wanted, checkpointing="full")) - before < 0
    packed = replace(wanted, quant=QuantConfig("nf4"))
    assert changes["nf4 in place of int8"] == rehearsed(tiny_folder, packed) - before
    assert json.loads(json.dumps(made.to_json()))["largest"][0]["tokens"] == 16


def test_a_byte_budget_is_found_between_none_and_full(tiny_folder: Path, tiny_config: Any) -> None:
    wanted = replace(WANTED, rows=16, tokens=128)
    full, none = (rehearsed(tiny_folder, replace(wanted, checkpointing=kind)) for kind in ("full", "none"))
    size = (full + 3 * none) // 4
    least = checkpointing_within(tiny_config, wanted, DeviceMemory(size, 0, accelerator=False))
    assert isinstance(least.checkpointing, int) and least.needed is not None and full < least.needed <= size
    assert rehearsed(tiny_folder, replace(wanted, checkpointing=least.checkpointing)) <= least.needed
    for enough, kind in ((none, "none"), (full, "full")):
        assert checkpointing_within(tiny_config, wanted, DeviceMemory(enough, 0, False)).checkpointing == kind


def test_a_batch_that_cannot_fit_is_refused_with_the_nearest_that_does(tiny_folder: Path, tiny_config: Any) -> None:
    wanted = replace(WANTED, rows=16, tokens=128)
    size = rehearsed(tiny_folder, replace(wanted, rows=3))
    with pytest.raises(ConfigError, match="the nearest batch that fits is 3 x 128 tokens"):
        checkpointing_within(tiny_config, wanted, DeviceMemory(size, 0, accelerator=False))
    with pytest.raises(ConfigError, match="not even two tokens fit"):
        checkpointing_within(tiny_config, wanted, DeviceMemory(1000, 0, accelerator=False))


def test_minimum_bytes_are_those_of_the_real_model(tiny_folder: Path, tiny_config: Any) -> None:
    model = load_quantized(tiny_folder, WANTED.quant)
    add_lora_(model, WANTED.lora)
    values = sum(parameter.numel() for parameter in adapter_parameters(model).values())
    tensors = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    expected = {"model": sum(tensors.values()), "gradients": 4 * values, "optimizer_state": 8 * values}
    assert minimum_bytes(tiny_config, WANTED) == expected


def test_a_model_without_a_rehearsal_has_counted_bytes_only(tiny_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    own = modeling_llama.LlamaModel.forward

    def looks_at_values(self: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        return own(self, input_ids[:, : len(input_ids.nonzero())], **options)

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", looks_at_values)
    with pytest.raises(RehearsalError), fake_tensors():
        Forecaster(tiny_config, False).forecast(WANTED)
    made = plan(tiny_config, WANTED, DeviceMemory(10 * MIB, 0, accelerator=False), [16])
    assert made.fits is None and made.forecast is None and made.largest == ()
    assert made.not_rehearsed is not None and "cannot be rehearsed" in made.not_rehearsed
    assert made.counted is not None and made.counted["model"] > 0
    least = sum(made.counted.values())
    assert plan(tiny_config, WANTED, DeviceMemory(least - 1, 0, accelerator=False), [16]).fits is False


def test_model_code_that_fails_on_a_packed_base_is_not_rehearsed(
    tiny_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    monkeypatch.setattr(LlamaMLP, "forward", lambda layer, x: x @ layer.up_proj.weight.T @ layer.down_proj.weight.T)
    made = plan(tiny_config, WANTED, DeviceMemory(10 * MIB, 0, accelerator=False), [16])
    assert made.fits is None and made.counted is not None
    assert made.not_rehearsed is not None and "a LlamaForCausalLM cannot be rehearsed" in made.not_rehearsed


def test_layers_that_stay_unpacked_are_planned_so() -> None:
    from transformers import MambaConfig

    config = MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2)
    made = plan(config, WANTED, DeviceMemory(10 * MIB, 0, accelerator=False), [16])
    assert made.fits is True and made.not_rehearsed is None


def test_usual_lengths_end_where_the_model_does(tiny_config: Any) -> None:
    assert tiny_config.max_position_embeddings == 2048
    assert usual_lengths(tiny_config, 600) == [512, 600, 2048]


def test_a_model_with_a_table_of_positions_is_planned_within_it() -> None:
    from transformers import GPT2Config, MptConfig

    tables = {
        "GPT2LMHeadModel": GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=1, n_head=2),
        "MptForCausalLM": MptConfig(vocab_size=50, max_seq_len=64, d_model=32, n_layers=1, n_heads=2),
    }
    for name, config in tables.items():
        assert usual_lengths(config, 60) == [60]
        with pytest.raises(
            ConfigError, match=f"examples of 65 tokens do not fit into a {name}, which has 64 positions"
        ):
            plan(config, WANTED, DeviceMemory(MIB, 0, accelerator=False), [65])
