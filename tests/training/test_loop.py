"""Tests of training against plain torch."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from qlora_lite import (
    LoraConfig,
    MemoryProfiler,
    QuantConfig,
    TrainConfig,
    add_lora_,
    load_adapter_,
    load_quantized,
    train,
)
from qlora_lite.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    NotFiniteError,
    Stopped,
    TargetError,
    TrainingError,
)
from qlora_lite.lora.adapters import adapter_parameters, adapters_disabled, lora_layers
from qlora_lite.training.loop import profile_steps


def adapted(folder: Path, format: str = "nf4", dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    model = load_quantized(folder, QuantConfig(format=format), dtype=dtype)
    torch.manual_seed(0)
    add_lora_(model, LoraConfig(**{"rank": 4, "alpha": 8, **lora}))
    return model


def batch(rows: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    tokens = torch.randint(100, (rows, 12), generator=torch.Generator().manual_seed(seed))
    labels = tokens.clone()
    labels[0, :5] = -100
    return {"input_ids": tokens, "labels": labels}


@pytest.mark.parametrize("format", ["nf4", "int8", "none"])
def test_gradients_are_those_of_plain_fp32_torch(tiny_folder: Path, format: str) -> None:
    from transformers import AutoModelForCausalLM

    model = adapted(tiny_folder, format)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    leaves: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    for name, layer in lora_layers(model).items():
        a, b = (part.detach().clone().requires_grad_() for part in (layer.lora_A, layer.lora_B))
        stored = layer.base_layer.weight
        dense = stored if isinstance(stored, torch.Tensor) else stored.dequantize(torch.float32)
        leaves |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
        weights[f"{name}.weight"] = dense.detach() + 2.0 * b @ a
    data = batch()
    torch.func.functional_call(plain, weights, kwargs=data).loss.backward()
    model(**data).loss.backward()
    for name, parameter in adapter_parameters(model).items():
        torch.testing.assert_close(parameter.grad, leaves[name].grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_loss_falls_and_the_base_stays_bit_for_bit(tiny_folder: Path, tmp_path: Path, optimizer: str) -> None:
    model = adapted(tiny_folder, dtype=torch.bfloat16).eval()
    stored = {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}
    config = TrainConfig(steps=12, learning_rate=1e-2, warmup_steps=2, optimizer=optimizer)
    result = train(model, [batch()], config, output_dir=tmp_path / "run", progress=False)
    assert result.losses[-1] < result.losses[0] - 0.1 and result.logits_reason is None
    now = model.state_dict()
    assert all(torch.equal(value, now[name]) for name, value in stored.items())
    assert not model.training and not any("forward" in vars(module) for module in model.modules())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == result.losses and lines[-1]["step"] == 12
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_first_loss_is_the_mean_over_labelled_tokens(tiny_folder: Path) -> None:
    model, data = adapted(tiny_folder), batch()
    logits = model(data["input_ids"]).logits[:, :-1]
    wanted = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), data["labels"][:, 1:].reshape(-1))
    assert train(model, [data], TrainConfig(steps=1), progress=False).losses[0] == pytest.approx(
        wanted.item(), rel=1e-5
    )


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_accumulation_equals_one_large_batch(tiny_folder: Path, checkpointing: str) -> None:
    whole = batch()
    halves = [{name: value[row : row + 1] for name, value in whole.items()} for row in range(2)]
    ends = []
    for batches, accumulation in (([whole], 1), (halves, 2)):
        model = adapted(tiny_folder)
        config = TrainConfig(steps=3, gradient_accumulation=accumulation, checkpointing=checkpointing)
        losses = train(model, batches, config, progress=False).losses
        ends.append((losses, adapter_parameters(model)))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-5)
    for name, parameter in ends[0][1].items():
        torch.testing.assert_close(parameter, ends[1][1][name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_loss_that_is_no_number_stops_before_the_update(tiny_folder: Path, tmp_path: Path) -> None:
    model = adapted(tiny_folder)
    train(model, [batch()], TrainConfig(steps=2), progress=False)
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    before = {name: parameter.clone() for name, parameter in adapter_parameters(model).items()}
    with pytest.raises(TrainingError, match=r"of step 1 is (nan|inf); the adapters keep their values"):
        train(model, [batch()], TrainConfig(steps=2), output_dir=tmp_path, progress=False)
    assert all(torch.equal(parameter, before[name]) for name, parameter in adapter_parameters(model).items())
    assert list(tmp_path.iterdir()) == []  # no step was done, so there is nothing to keep, and nothing is replaced


def test_an_error_after_some_steps_keeps_what_was_trained(tiny_folder: Path, tmp_path: Path) -> None:
    def broken() -> Iterator[dict[str, torch.Tensor]]:
        yield batch()
        raise OSError("the disk with the data is gone")

    model = adapted(tiny_folder)
    with pytest.raises(CheckpointError, match="disk with the data"):
        train(model, broken(), TrainConfig(steps=2), output_dir=tmp_path, progress=False)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(key.endswith("lora_B.weight") and value.any() for key, value in saved.items())
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="not empty"):
        train(model, [batch()], TrainConfig(steps=1), output_dir=tmp_path, progress=False)
    bad = {**batch(), "labels": torch.full((2, 12), -100)}
    with pytest.raises(TrainingError, match="has a label"):
        train(adapted(tiny_folder), [bad], TrainConfig(steps=1), output_dir=tmp_path, overwrite=True, progress=False)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_gradients_from_before_and_after_a_failure_do_not_count(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    model = adapted(tiny_folder)
    first = train(model, [batch()], TrainConfig(steps=1), progress=False).steps[0].gradient_norm
    model = adapted(tiny_folder)
    model(**batch()).loss.mul(1000).backward()
    assert train(model, [batch()], TrainConfig(steps=1), progress=False).steps[0].gradient_norm == pytest.approx(first)
    assert all(parameter.grad is None for parameter in adapter_parameters(model).values())


@pytest.mark.parametrize("family", ["LlamaConfig", "OPTConfig"])
def test_packing_is_refused_where_examples_would_see_each_other(family: str) -> None:
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32} if family == "LlamaConfig" else {"ffn_dim": 32, "word_embed_proj_dim": 32}
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, family)(**sizes))
    add_lora_(model, LoraConfig(rank=2))
    ids = torch.arange(2, 12).view(1, 10)
    packed = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(5).repeat(2).view(1, 10)}
    if family == "LlamaConfig":
        train(model, [packed], TrainConfig(steps=1), progress=False)
        return
    with pytest.raises(ConfigError, match="lets packed examples see each other"):
        train(model, [packed], TrainConfig(steps=1), progress=False)


class Signalled(list[dict[str, torch.Tensor]]):
    """Batches that come with a signal, each time the one of this index is taken."""

    def __init__(self, index: int, number: int, *given: Any) -> None:
        super().__init__(*given)
        self.index, self.number = index, number

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for index in range(len(self)):
            if index == self.index:
                signal.raise_signal(self.number)
            yield self[index]


@pytest.mark.parametrize(("number", "status", "index"), [(signal.SIGTERM, 143, 5), (signal.SIGINT, 130, 4)])
def test_a_signal_saves_the_last_step_that_was_done(
    tiny_folder: Path, memory_path: Path, number: int, status: int, index: int
) -> None:
    config = TrainConfig(steps=4, gradient_accumulation=2, learning_rate=1e-2)
    batches, run = [batch(seed=n) for n in range(6)], memory_path / "run"
    model, handlers = adapted(tiny_folder, dropout=0.1), [signal.getsignal(signal.SIGINT), signal.getsignal(number)]
    said = "after step 2 of 4; resuming continues from .*checkpoints/step-000002"
    with pytest.raises(Stopped, match=said) as stop:
        train(model, Signalled(index, number, batches), config, output_dir=run, progress=False)
    assert stop.value.code == status and handlers == [signal.getsignal(signal.SIGINT), signal.getsignal(number)]
    # Nothing of the step that was begun is left, and the folder is the same as without it.
    assert {path.name for path in run.iterdir()} == {"adapter", "checkpoints", "events.jsonl", "metrics.jsonl"}
    model = adapted(tiny_folder, dropout=0.1)
    resumed = train(model, batches, config, output_dir=run, resume=True, progress=False)
    whole = train(adapted(tiny_folder, dropout=0.1), batches, config, progress=False)
    assert resumed.losses == whole.losses and resumed.resumed_from == run / "checkpoints" / "step-000002"


def test_a_signal_before_the_first_step_leaves_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="stopped by SIGTERM before the first step was done"):
        train(adapted(tiny_folder), Signalled(0, signal.SIGTERM, [batch()]), TrainConfig(), output_dir=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="resume and save_steps need an output_dir"):
        train(adapted(tiny_folder), [batch()], TrainConfig(save_steps=1))


def test_what_cannot_be_trained_is_refused(tiny_folder: Path) -> None:
    config = TrainConfig(steps=2)
    with pytest.raises(TargetError, match="no adapters"):
        train(load_quantized(tiny_folder), [batch()], config)
    with pytest.raises(ConfigError, match="float16, which a CPU"):
        train(adapted(tiny_folder, dtype=torch.float16), [batch()], config)
    model = adapted(tiny_folder)
    with pytest.raises(TrainingError, match="ended in step 2 of 2"):
        train(model, iter([batch()]), config, progress=False)
    with pytest.raises(TrainingError, match="has a label"):
        train(model, [{**batch(), "labels": torch.full((2, 12), -100)}], config, progress=False)
    for bad, message in (
        ({"x": torch.zeros(1)}, "input_ids and labels"),
        ((batch()["input_ids"],), "got a tuple"),
        ({**batch(), "labels": None}, "got NoneType"),
        ({**batch(), "labels": batch()["labels"].int()}, "labels must be int64"),
        ({**batch(), "labels": batch()["labels"][:, 1:]}, "of the shape of input_ids"),
        ({**batch(), "input_ids": batch()["input_ids"] + 50}, "tokens must be in"),
        ({**batch(), "scale": torch.tensor(1.0)}, "scale of a batch must be a tensor with a row"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(model, [bad], config, progress=False)
    with pytest.raises(InputError, match="labels must be in"):
        train(model, [{**batch(), "labels": batch()["labels"].clamp(min=-1)}], config, progress=False)
    for empty in ([], DataLoader([], batch_size=2)):
        with pytest.raises(ConfigError, match="empty"):
            train(model, empty, config, progress=False)
    lora_layers(model)["model.layers.0.mlp.up_proj"].merge_weights()
    with pytest.raises(ConfigError, match="1 layers are merged"):
        train(model, [batch()], config, progress=False)


def test_profiler_sees_the_phases_and_their_bytes(tiny_folder: Path) -> None:
    with MemoryProfiler() as profiler:
        model = adapted(tiny_folder)
        train(model, [batch()], TrainConfig(steps=2), profiler=profiler, progress=False)
    report = profiler.report()
    assert [phase.name for phase in report.phases] == ["forward", "backward", "optimizer"]
    adapters = sum(parameter.nbytes for parameter in adapter_parameters(model).values())
    update = report.phase("optimizer")
    assert update is not None and update.breakdown is not None
    by_category = {category.name: size for category, size in update.breakdown.by_category().items()}
    assert by_category["ADAPTER"] == by_category["GRADIENT"] == adapters
    assert 2 * adapters <= by_category["OPTIMIZER_STATE"] < 2 * adapters + 1000
    assert (
        profile_steps(tiny_folder, QuantConfig(), LoraConfig(rank=2), TrainConfig(steps=2), rows=1, tokens=8).phase(
            "load"
        )
        is not None
    )


def test_a_step_goes_through_on_fake_tensors_of_a_pretended_accelerator(tiny_folder: Path, command_server: Any) -> None:
    command = [command_server.python, str(Path(__file__).parents[1] / "pretended_accelerator.py"), str(tiny_folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    caught = "fakegpu FakeTensorDeviceMismatchError"
    models = [f"{format} {caught}" for format in ("nf4", "int8", "none")]
    assert done.stdout.splitlines() == [*models, "convolution fakegpu"]


@pytest.mark.parametrize("adapter_dtype", [torch.float16, torch.bfloat16])
def test_adapters_of_16_bits_learn(tiny_folder: Path, adapter_dtype: torch.dtype) -> None:
    losses = []
    for dtype in (torch.float32, adapter_dtype):
        model = adapted(tiny_folder, adapter_dtype=dtype)
        losses.append(train(model, [batch()], TrainConfig(steps=8, learning_rate=1e-2), progress=False).losses)
        assert {parameter.dtype for parameter in adapter_parameters(model).values()} == {dtype}
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1][-1] < losses[1][0] - 0.05


@pytest.mark.parametrize(
    ("learning_rate", "message"), [(1e30, "of step 2 is (nan|inf)"), (1e36, "(update of step 1|of step 2)")]
)
def test_a_run_that_diverges_leaves_an_adapter_that_works(
    tiny_folder: Path, tmp_path: Path, learning_rate: float, message: str
) -> None:
    config = TrainConfig(steps=5, learning_rate=learning_rate)
    with pytest.raises(NotFiniteError, match=f"{message}.*holds an adapter that gave a finite loss"):
        train(adapted(tiny_folder), [batch()], config, output_dir=tmp_path / "run", progress=False)
    model = load_quantized(tiny_folder, QuantConfig(), dtype=torch.float32)
    load_adapter_(model, tmp_path / "run" / "adapter")
    assert train(model, [batch()], TrainConfig(steps=1), progress=False).losses[0] < 100


def test_an_update_that_overflows_is_an_error(tiny_folder: Path) -> None:
    with pytest.raises(NotFiniteError, match="the update of step 1 made adapters NaN or infinite"):
        train(adapted(tiny_folder, adapter_dtype=torch.float16), [batch()], TrainConfig(steps=1, learning_rate=1e6))


def test_half_precision_products_on_a_cpu_and_sleeping_adapters_are_refused(tiny_folder: Path) -> None:
    model = load_quantized(tiny_folder, QuantConfig(compute_dtype=torch.float16))
    add_lora_(model, LoraConfig(rank=2))
    with pytest.raises(ConfigError, match="14 layers compute in float16"):
        train(model, [batch()], TrainConfig(steps=1), progress=False)
    model = adapted(tiny_folder)
    with adapters_disabled(model), pytest.raises(ConfigError, match="14 adapters are switched off"):
        train(model, [batch()], TrainConfig(steps=1), progress=False)
