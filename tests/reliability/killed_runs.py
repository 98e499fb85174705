"""Does a run that is killed at any instant lose more than the steps since its last checkpoint?

    python tests/reliability/killed_runs.py            # at every change on disk
    python tests/reliability/killed_runs.py --tiny     # at some of them

A small run with checkpoints is killed by SIGKILL before each of its writes, syncs, renames and removals, in the middle
of writes, and at random times, and so is the call that resumes a run that was killed half-way. After each kill, every
checkpoint must be sound and the adapter complete, and the newest checkpoint must be of the last step in the metrics or
of the step before. The same call with resume=True must finish with the files of an undisturbed run. The last line is
JSON: the number of kills of each of the two, and of kills with problems.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from example_model import make_tiny_model
from kill_points import Kill, all_kills, ended
from qlora_lite import LoraConfig, QuantConfig, TrainConfig, add_lora_, load_quantized, train
from qlora_lite.errors import QLoRAError
from qlora_lite.lora.peft.save_load import load_adapter_
from qlora_lite.training.run_checkpoints import checkpoint_problem, checkpoints_by_step

TINY_STEP, TINY_MOMENTS = 34, 2
MOMENTS = 40
MEASURED = ("seconds", "tokens_per_second", "peak_bytes")  # in lines of metrics.jsonl
CONFIG = TrainConfig(steps=3, learning_rate=1e-2, save_steps=1, keep_last=1, gradient_accumulation=2)


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(100, (1, 8), generator=generator) for _ in range(4)]
    return [{"input_ids": row, "labels": row} for row in rows]


def run(model: Path, folder: Path, resume: bool) -> None:
    """Loads, adapts and trains: the work of one process."""
    torch.set_num_threads(1)
    random.seed(0)  # a forked process seeds Python's random numbers anew
    loaded = load_quantized(model, QuantConfig(), dtype=torch.float32)
    torch.manual_seed(0)
    add_lora_(loaded, LoraConfig(rank=2, dropout=0.1, target_modules=["q_proj", "down_proj"]))
    train(loaded, batches(), CONFIG, output_dir=folder, resume=resume, progress=False)


def final_files(folder: Path) -> dict[str, bytes]:
    """Returns the files of a finished run, without times and speeds."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    with_times = ("metrics.jsonl", "events.jsonl", "manifest.json")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figures = [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]
    same = {name: path.read_bytes() for name, path in files.items() if path.name not in with_times}
    return {**same, "names": json.dumps(sorted(files)).encode(), "figures": json.dumps(figures).encode()}


def wrong_after_kill(model: Any, folder: Path) -> list[str]:
    """Returns the checkpoints and adapters that are neither as before nor as intended."""
    found = [
        f"{path.name}: {wrong}" for path in checkpoints_by_step(folder).values() if (wrong := checkpoint_problem(path))
    ]
    if (folder / "adapter").exists() or (folder / "metrics.jsonl").exists():
        try:
            load_adapter_(model, folder / "adapter")
        except QLoRAError as error:
            found.append(str(error))
    return found


def steps_kept(folder: Path) -> int:
    """Returns the step of the newest sound checkpoint, or 0."""
    return next((step for step, path in checkpoints_by_step(folder).items() if checkpoint_problem(path) is None), 0)


def steps_done(folder: Path) -> int:
    """Returns the number of lines of the metrics."""
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def killed_and_resumed(
    model: Path, folder: Path, wanted: dict[str, bytes], begun: Path | None, kill: Kill
) -> tuple[int, list[str]]:
    """Kills a run. Returns its exit status and the problems afterwards. begun: the folder that it resumes, if any."""
    shutil.rmtree(folder, ignore_errors=True)
    if begun is not None:
        shutil.copytree(begun, folder)
    had = steps_kept(folder)
    status = ended(functools.partial(run, model, folder, begun is not None), kill)
    problems = wrong_after_kill(load_quantized(model, QuantConfig()), folder)
    if (kept := steps_kept(folder)) < max(had, steps_done(folder) - 1):
        problems.append(f"{steps_done(folder)} steps were done, {kept} are kept")
    if (resumed := ended(functools.partial(run, model, folder, True))) != 0:
        return status, [*problems, f"resuming ended with {resumed}"]
    found = final_files(folder)
    return status, problems + [name for name in wanted | found if wanted.get(name) != found.get(name)]


def kills_of_a_run(model: Path, folder: Path, every: int, moments: int) -> Iterator[tuple[str, Kill, list[str]]]:
    """Yields (name, kill, problems) for a run, and for resuming one that was killed half-way."""
    began = time.monotonic()
    if ended(functools.partial(run, model, folder, False)) != 0:
        sys.exit("the undisturbed run failed")
    seconds, wanted, count = time.monotonic() - began, final_files(folder), 0
    fresh = functools.partial(killed_and_resumed, model, folder, wanted, None)
    for kill, problems in all_kills(fresh, folder, every, moments, seconds):
        count += kill.point is not None
        yield "run", kill, problems
    shutil.rmtree(folder)
    status = ended(functools.partial(run, model, folder, False), Kill(folder, count * every // 2))
    if status == 0 or not 0 < steps_kept(folder) < CONFIG.steps:
        sys.exit(f"the run to be killed half-way ended with {status} and kept {steps_kept(folder)} steps")
    begun = folder.with_name("begun")
    shutil.copytree(folder, begun)
    again = functools.partial(killed_and_resumed, model, folder, wanted, begun)
    for kill, problems in all_kills(again, folder, every, moments, seconds):
        yield "resumed run", kill, problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help=f"at every {TINY_STEP}th instant")
    tiny = parser.parse_args().tiny
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        model = make_tiny_model(Path(scratch) / "model", hidden=32)
        killed, wrong = Counter[str](), 0
        often = (TINY_STEP, TINY_MOMENTS) if tiny else (1, MOMENTS)
        for what, kill, problems in kills_of_a_run(model, Path(scratch) / "run", *often):
            killed[what] += 1
            wrong += bool(problems)
            for problem in problems:
                print(f"{what}, killed {kill}: {problem}")
    print(json.dumps({"killed": killed, "wrong": wrong}))


if __name__ == "__main__":
    main()
