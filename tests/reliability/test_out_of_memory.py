"""Memory that really runs out, in a process with a limit: batches are halved once, and the gradient is the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_lite.devices import is_out_of_memory

PROGRAM = """
import json, resource, sys
import psutil, torch
from qlora_lite import LoraConfig, QuantConfig, TrainConfig, add_lora_, load_quantized, train
from qlora_lite.errors import TrainingError

folder, rows, spare = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) << 20
torch.set_num_threads(1)

def run(rows, steps=1):
    torch.manual_seed(0)
    model = load_quantized(folder, QuantConfig())
    add_lora_(model, LoraConfig(rank=4))
    ids = torch.randint(5, 90, (rows, 512), generator=torch.Generator().manual_seed(1))
    config = TrainConfig(steps=steps, checkpointing="none")
    result = train(model, [{"input_ids": ids, "labels": ids}], config, progress=True)
    return {"losses": result.losses, "norms": [s.gradient_norm for s in result.steps], "halved_at": result.halved_at}

if spare:
    run(1)  # what libraries take once
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, resource.RLIM_INFINITY))
try:
    print(json.dumps(run(rows)))
except TrainingError as error:
    print(json.dumps({"error": str(error)}))
"""


def run(folder: Path, rows: int, spare: int) -> tuple[dict[str, object], str]:
    command = [sys.executable, "-c", PROGRAM, str(folder), str(rows), str(spare)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_a_step_that_does_not_fit_is_made_again_in_halves(tiny_folder: Path) -> None:
    whole, _ = run(tiny_folder, 128, 0)
    halved, said = run(tiny_folder, 128, 330)
    assert whole["halved_at"] is None and halved["halved_at"] == 1
    assert "memory ran out in step 1: from here on batches are computed in halves, for the same gradient" in said
    for name in ("losses", "norms"):
        torch.testing.assert_close(torch.tensor(halved[name]), torch.tensor(whole[name]), rtol=2e-3, atol=1e-4)


def test_what_does_not_fit_in_halves_either_is_one_sentence(tiny_folder: Path) -> None:
    found, _ = run(tiny_folder, 128, 100)
    assert "memory ran out in step 1 again, with halved batches; train on shorter rows" in str(found["error"])
    found, _ = run(tiny_folder, 1, 1)
    assert "memory ran out in step 1 with one row" in str(found["error"])


def test_what_is_no_lack_of_memory_is_told_apart() -> None:
    assert not is_out_of_memory(RuntimeError("shapes do not fit")) and not is_out_of_memory(
        ValueError("can't allocate")
    )
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)
