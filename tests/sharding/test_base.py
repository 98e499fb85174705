"""Tests of training on a base in shares: the steps, evaluations and checkpoints of one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized
from qlora_lite.sharding.base import check_whole, sharded_base
from qlora_lite.sharding.count import shares_of_model

# Batches with more rows than processes, with one row, and with labels in the first two of four rows.
RUN = """
import hashlib, json, os, signal, sys
import torch
from safetensors.torch import save_file
from qlora_lite import LoraConfig, QuantConfig, TrainConfig, add_lora_, load_quantized, save_adapter, train
from qlora_lite.errors import QLoRAError, Stopped
from qlora_lite.export.merged import export_merged
from qlora_lite.lora.adapters import adapter_parameters
from qlora_lite.sharding.base import sharded_base, whole_tensor
from qlora_lite.training.step import TrainingStep

folder, out, cases = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
generator = torch.Generator().manual_seed(1)
batches = []
for rows in (5, 1, 4):
    ids = torch.randint(5, 60, (rows, 12), generator=generator)
    unlabelled = torch.rand(ids.shape, generator=generator) < 0.3
    batches.append({"input_ids": ids, "labels": ids.masked_fill(unlabelled, -100)})
batches[2]["labels"][2:] = -100
gradients, received, update = [], [], TrainingStep._update

def keep(self, loss, before):
    gradients.append({name: parameter.grad.clone() for name, parameter in self.run.trained.items()})
    received.append(0 if self.processes.group is None else self.processes.group.received)
    return update(self, loss, before)

TrainingStep._update = keep

def given(at):
    for number, batch in enumerate(batches * 20):
        if number == at and rank == count - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch

def digest(model):
    sums = hashlib.sha256()
    for name, _ in (*model.named_parameters(), *model.named_buffers()):
        if "lora_" not in name:
            sums.update(whole_tensor(model, name).detach().contiguous().view(-1).view(torch.uint8).numpy())
    return sums.hexdigest()

def refusal(call):
    try:
        call()
    except QLoRAError as error:
        return str(error)

def run(name, quant, lora, settings, stop=None, **words):
    gradients.clear()
    received.clear()
    model = load_quantized(folder, QuantConfig(**quant), dtype=torch.float32, shard=count > 1)
    add_lora_(model, LoraConfig(**{"rank": 2, "alpha": 8, "dropout": 0.0, **lora}))
    for number, parameter in enumerate(adapter_parameters(model).values()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.data.add_(noise, alpha=0.02)
    before = digest(model)
    config = TrainConfig(**{"steps": 3, "gradient_accumulation": 2, "learning_rate": 1e-3, "eval_steps": 2, **settings})
    words = {**words, "output_dir": os.path.join(out, name), "eval_batches": batches, "progress": False}
    try:
        result = train(model, given(stop), config, **words)
    except Stopped as stopped:
        return {"stopped": str(stopped)}
    if rank == 0:
        save_file(gradients[0], os.path.join(out, name + ".safetensors"))
    found = {"losses": result.losses, "held_out": [evaluation.held_out_loss for evaluation in result.evaluations]}
    found["values"] = [float(value.detach().double().sum()) for value in adapter_parameters(model).values()]
    found["unchanged"] = digest(model) == before
    if (base := sharded_base(model)) is not None:
        found["refused"] = refusal(lambda: export_merged(model, os.path.join(out, "merged")))
        found["received"] = received[1] - received[0]
        base.empty()
    return found

print(json.dumps({name: run(name, **case) for name, case in cases.items()}))
"""
CASES: dict[str, Any] = {
    "full": {"quant": {}, "lora": {}, "settings": {"steps": 20, "checkpointing": "full", "save_steps": 10}},
    "none": {"quant": {"format": "fp4", "embedding_format": "int8"}, "lora": {}, "settings": {"checkpointing": "none"}},
    "bytes": {"quant": {"format": "int8"}, "lora": {}, "settings": {"checkpointing": 4_000_000}},
    "dora": {"quant": {"double_quant": False}, "lora": {"variant": "dora"}, "settings": {"checkpointing": "none"}},
}
CUT: dict[str, Any] = {"quant": {}, "lora": {}, "settings": {"steps": 4, "save_steps": 1}}

Run = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def runs(run_processes: Run, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """What one process with a whole base found, and two with shares; their folders."""
    found = {}
    for count in (1, 2):
        out = tmp_path_factory.mktemp(f"of{count}")
        found[count] = out, run_processes(count, RUN, out, tiny_folder, out, json.dumps(CASES))
    return found


@pytest.mark.parametrize("name", CASES)
def test_several_processes_learn_what_one_does(runs: dict[int, Any], name: str) -> None:
    out, (alone,) = runs[1]
    wanted = load_file(out / f"{name}.safetensors")
    folder, ranks = runs[2]
    found = [rank[name] for rank in ranks]
    assert all(one["losses"] == found[0]["losses"] and one["values"] == found[0]["values"] for one in found)
    gradients = load_file(folder / f"{name}.safetensors")
    errors = {key: float((gradients[key] - value).norm() / value.norm()) for key, value in wanted.items()}
    assert max(errors.values()) <= 1e-6, max(errors, key=errors.__getitem__)
    for figure in ("losses", "held_out"):
        torch.testing.assert_close(
            torch.tensor(found[0][figure]), torch.tensor(alone[name][figure]), rtol=1e-4, atol=1e-5
        )
    assert all(one["unchanged"] for one in found) and alone[name]["unchanged"]
    assert all("an export reads the whole base" in one["refused"] for one in found)


def test_what_a_step_receives_is_what_a_plan_says(runs: dict[int, Any], tiny_folder: Path) -> None:
    _, ranks = runs[2]
    for name in ("full", "none", "bytes"):
        case = CASES[name]
        model = load_quantized(tiny_folder, QuantConfig(**case["quant"]), dtype=torch.float32)
        add_lora_(model, LoraConfig(rank=2))
        planned = shares_of_model(model, 2)
        assert {rank[name]["received"] for rank in ranks} == {2 * planned.received}, name  # two batches in a step
        assert planned.received <= 3.05 * planned.whole / 2 + 64 * 2 * 5  # what fills a unit up to equal shares


def test_checkpoints_hold_adapters_and_are_written_once(runs: dict[int, Any]) -> None:
    out, _ = runs[2]
    names = sorted(path.name for path in (out / "full" / "checkpoints" / "step-000020").iterdir())
    whole = runs[1][0] / "full" / "checkpoints" / "step-000020"
    assert names == sorted(path.name for path in whole.iterdir())
    assert (out / "full" / "metrics.jsonl").read_text().count("\n") == 20 + 11
    state = json.loads((out / "full" / "checkpoints" / "step-000020" / "state.json").read_text())
    assert state["base"] == json.loads((whole / "state.json").read_text())["base"]  # the bytes of all shares together


def test_a_stopped_run_goes_on_with_another_number_of_processes(
    run_processes: Run, tiny_folder: Path, tmp_path: Path
) -> None:
    arguments = (tmp_path, tiny_folder, tmp_path)
    (whole,) = run_processes(1, RUN, *arguments, json.dumps({"whole": CUT}))
    for number, processes in enumerate(((3, 2), (2, 1))):
        name = f"cut{number}"
        for rank in run_processes(processes[0], RUN, *arguments, json.dumps({name: {**CUT, "stop": 5}})):
            assert rank[name]["stopped"].startswith("stopped by")
        assert (tmp_path / name / "checkpoints" / "step-000002").is_dir()
        resumed = {name: {**CUT, "resume": True}}
        for rank in run_processes(processes[1], RUN, *arguments, json.dumps(resumed)):
            for figure in ("losses", "held_out", "values"):
                ours, wanted = torch.tensor(rank[name][figure]), torch.tensor(whole["whole"][figure])
                torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


def test_a_whole_base_is_no_sharded_one(tiny_folder: Path) -> None:
    model = load_quantized(tiny_folder, QuantConfig())
    add_lora_(model, LoraConfig(rank=2))
    assert sharded_base(model) is None
    check_whole(model, "an export")
