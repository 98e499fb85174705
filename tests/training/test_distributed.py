"""Tests of several processes on one run, started by `accelerate launch`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lite.choices import DEFAULTS, with_overrides
from qlora_lite.training.distributed import rows_of_process, split_in_two

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import json, os, signal, sys
import torch
from qlora_lite import LoraConfig, QuantConfig, TrainConfig, add_lora_, load_quantized, train
from qlora_lite.lora import adapter_parameters
from qlora_lite.errors import QLoRAError, Stopped

folder, out, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
rank = int(os.environ.get("RANK", "0"))
os.environ["QLORA_LITE_CHOICES"] = "default" if rank else "default,attention_forward=torch"
generator = torch.Generator().manual_seed(1)
batches = []
for rows in (5, 1, 4):
    ids = torch.randint(5, 60, (rows, 12), generator=generator)
    unlabelled = torch.rand(ids.shape, generator=generator) < 0.3
    batches.append({"input_ids": ids, "labels": ids.masked_fill(unlabelled, -100)})
    batches[-1]["position_ids"] = torch.arange(6).repeat(rows, 2)  # packed, which is checked anew in a resumed run
batches[2]["labels"][2:] = -100  # of two processes, the second one has no label there, nor in the third step

def fresh(dropout=0.0):
    model = load_quantized(folder, QuantConfig(), dtype=torch.float32)
    add_lora_(model, LoraConfig(rank=2, alpha=8, dropout=dropout))
    for n, parameter in enumerate(adapter_parameters(model).values()):
        start = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n)) * 0.02
        parameter.data = start + rank  # what starts apart has to be brought together
    return model

def given(what, at):
    for n, batch in enumerate(batches * 9):
        if rank == count - 1 and n == at and what == "error":
            batch = {**batch, "labels": batch["labels"][:, :-1]}
        if rank == count - 1 and n == at and what == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch

def run(name, what=None, dropout=0.0, **words):
    config = TrainConfig(steps=3, learning_rate=1e-2, gradient_accumulation=2, save_steps=1, eval_steps=2)
    words = {**words, "eval_batches": batches}
    model = fresh(dropout)
    ended = None
    try:
        result = train(model, given(what, 3), config, output_dir=os.path.join(out, name), progress=False, **words)
        figures = {"losses": result.losses, "norms": [step.gradient_norm for step in result.steps]}
        figures["choices"] = dict(result.choices)
        figures["held_out"] = [evaluation.held_out_loss for evaluation in result.evaluations]
    except (QLoRAError, Stopped) as error:
        figures = {"ended": type(error).__name__, "by": str(error)}
    values = torch.cat([value.detach().flatten() for value in adapter_parameters(model).values()])
    figures["values"] = float(values.double().sum())
    return figures

found = {"plain": run("plain")}
if count > 1:
    found["error"] = run("error", "error")
    found["whole"] = run("whole", dropout=0.3)
    found["term"] = run("cut", "term", dropout=0.3)
    found["resumed"] = run("cut", dropout=0.3, resume=True)
with open(os.path.join(out, f"found-{rank}.json"), "w") as file:
    json.dump(found, file)
"""


def launched(processes: int, folder: Path, out: Path) -> list[dict[str, dict[str, Any]]]:
    """What each process found."""
    out.mkdir()
    (out / "program.py").write_text(PROGRAM)
    # `--cpu` starts one process, whatever the number (it leaves several to mpirun): the launcher of many devices does
    # start them, and the variable has them use the CPU and gloo.
    how = ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else ["--cpu", "--num_processes", "1"]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *how,
        "--num_machines",
        "1",
        "--dynamo_backend",
        "no",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    words = [*command, "--mixed_precision", "no", str(out / "program.py"), str(folder), str(out), str(processes)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"found-{number}.json").read_text()) for number in range(processes)]


def test_two_processes_learn_as_one_end_together_and_go_on_as_if_never_ended(tiny_folder: Path, tmp_path: Path) -> None:
    (alone,) = launched(1, tiny_folder, tmp_path / "one")
    first, second = launched(2, tiny_folder, tmp_path / "two")
    for name in ("losses", "norms", "held_out"):
        ours, theirs = torch.tensor(first["plain"][name]), torch.tensor(alone["plain"][name])
        torch.testing.assert_close(ours[:1], theirs[:1], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)  # AdamW makes much of small gradients
    assert first["plain"] == second["plain"]
    assert first["plain"]["choices"] == alone["plain"]["choices"] == with_overrides(DEFAULTS, "attention_forward=torch")
    assert len((tmp_path / "two" / "plain" / "metrics.jsonl").read_text().splitlines()) == 3 + 3
    assert second["error"]["ended"] == "ConfigError" and "labels must be of the shape" in second["error"]["by"]
    assert first["error"]["ended"] == "TrainingError" and "1 of 2 processes failed" in first["error"]["by"]
    assert first["term"]["ended"] == second["term"]["ended"] == "Stopped" and first["whole"] == second["whole"]
    assert first["whole"]["losses"][0] != pytest.approx(first["plain"]["losses"][0], abs=1e-6)  # dropout was there
    assert first["resumed"] == second["resumed"] == first["whole"]


def test_rows_are_shared_out_whole() -> None:
    batch = {"input_ids": torch.arange(10).view(5, 2), "labels": torch.arange(10).view(5, 2)}
    for processes in (1, 2, 3, 5, 7):
        parts = [rows_of_process(batch, number, processes) for number in range(processes)]
        there = [part for part in parts if part is not None]
        assert torch.equal(torch.cat([part["input_ids"] for part in there]), batch["input_ids"])
        assert len(there) == min(5, processes) and {len(part["labels"]) for part in there} <= {
            5 // processes or 1,
            1 + 5 // processes,
        }
    assert [len(part["input_ids"]) for part in split_in_two(batch)] == [2, 3]
    one_row = {name: value[:1] for name, value in batch.items()}
    (whole,) = split_in_two(one_row)
    assert torch.equal(whole["input_ids"], one_row["input_ids"])
