"""Does a run whose base is in shares survive the end of one of its processes, at any moment?

    python tests/reliability/lost_processes.py            # 40 moments
    python tests/reliability/lost_processes.py --tiny     # three of them

Two processes train a small model with checkpoints. One of them is killed by SIGKILL, runs out of memory or computes NaN
when it waits for the other one for the Nth time: while it loads, before the first step, in forward, in backward, in an
evaluation or between steps. The other one must end within `SECONDS`, and its error must name the process and the
reason. Afterwards every checkpoint must be sound, and the newest one of the last step in the metrics or of the step
before. The same command with resume must finish with the files of an undisturbed run. The last line is JSON: moments,
and how many hung, lost steps, told a wrong reason, or ended differently.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy

from example_model import make_tiny_model
from killed_runs import final_files, steps_kept, wrong_after_kill
from qlora_lite import LoraConfig, QuantConfig, TrainConfig, add_lora_, load_quantized, train
from qlora_lite.errors import QLoRAError

PROCESSES = 2
SECONDS = 20.0  # for which the other process may go on
LONGEST = 120.0  # of a run that nothing happens to
MOMENTS, TINY_MOMENTS = 40, 3
CONFIG = TrainConfig(steps=3, learning_rate=1e-2, save_steps=1, keep_last=1, eval_steps=2)
REASONS = {"kill": "it was killed", "memory": "memory ran out", "nan": "is nan in process"}


def harm_at(number: int, how: str) -> list[int]:
    """Makes this process come to harm when it waits for others for the Nth time; returns the count of these times."""
    import torch

    from qlora_lite.sharding.group import Group
    from qlora_lite.training.step import TrainingStep

    times = [0]

    def counted(own: Any) -> Any:
        def call(self: Group, *arguments: Any) -> Any:
            times[0] += 1
            if times[0] == number and how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if times[0] == number and how == "memory":
                raise MemoryError("can't allocate memory")
            return own(self, *arguments)

        return call

    Group.sum, Group.gather = counted(Group.sum), counted(Group.gather)  # type: ignore[method-assign]
    gradients = TrainingStep._gradients

    def spoiled(self: TrainingStep, *arguments: Any) -> torch.Tensor:
        loss = gradients(self, *arguments)
        return loss * torch.nan if how == "nan" and self.number >= number else loss

    TrainingStep._gradients = spoiled  # type: ignore[method-assign]
    return times


def worker(model: Path, folder: Path, resume: bool, number: int, how: str) -> None:
    """Loads, adapts and trains in one process; prints the error, or the number of times that it waited."""
    import torch

    torch.set_num_threads(1)
    random.seed(0)  # checkpoints hold these states too, and each process begins with others
    numpy.random.seed(0)
    times = harm_at(number, how)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(100, (3, 8), generator=generator) for _ in range(4)]
    batches = [{"input_ids": ids, "labels": ids} for ids in rows]
    found: dict[str, Any] = {}
    try:
        loaded = load_quantized(model, QuantConfig(), dtype=torch.float32, shard=True)
        torch.manual_seed(0)
        add_lora_(loaded, LoraConfig(rank=2, dropout=0.1, target_modules=["q_proj", "down_proj"]))
        given: dict[str, Any] = {"output_dir": folder, "resume": resume, "eval_batches": batches[:1]}
        train(loaded, batches, CONFIG, progress=False, **given)
    except (QLoRAError, MemoryError) as error:
        found["error"] = str(error)
    print(json.dumps({**found, "times": times[0]}))


def start(model: Path, folder: Path, resume: bool, harm: tuple[int, int, str]) -> list[subprocess.Popen[str]]:
    """Starts the processes of a run. harm: to which process, when and how."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = []
    for rank in range(PROCESSES):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES), "OMP_NUM_THREADS": "1"}
        own["QLORA_LITE_CHOICES"] = "default"  # choices by time differ between runs
        given = [str(number) for number in harm[1:]] if rank == harm[0] else ["0", "none"]
        words = [sys.executable, __file__, "--worker", str(model), str(folder), str(int(resume)), *given]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        environment = {**os.environ, **own, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started.append(subprocess.Popen(words, env=environment, **pipes))
    return started


def outcome(processes: list[subprocess.Popen[str]], victim: int) -> list[dict[str, Any]] | None:
    """Returns what each process printed; None if one went on for too long after the victim had ended."""
    try:
        processes[victim].wait(LONGEST)
        until = time.monotonic() + SECONDS
        for process in processes:
            process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        for process in processes:
            process.kill()
    printed = [process.communicate()[0].splitlines() for process in processes]
    return [json.loads(lines[-1]) if lines else {} for lines in printed]


def problems_after(model: Path, folder: Path, wanted: dict[str, bytes], harm: tuple[int, int, str]) -> list[str]:
    """Runs, harms, and resumes; returns what is wrong, each beginning with its kind."""
    shutil.rmtree(folder, ignore_errors=True)
    rank, _, how = harm
    found = outcome(start(model, folder, False, harm), rank)
    if found is None:
        return ["hung"]
    told, problems = found[1 - rank].get("error", "nothing"), []
    if REASONS[how] not in told or f"process {rank}" not in told:
        problems.append(f"told: {told}")
    problems += [f"lost: {text}" for text in wrong_after_kill(load_quantized(model, QuantConfig()), folder)]
    metrics = folder / "metrics.jsonl"
    done = metrics.read_text().count('"loss": ') if metrics.exists() else 0  # evaluations have other lines
    if (kept := steps_kept(folder)) < done - 1:
        problems.append(f"lost: {done} steps were done, {kept} are kept")
    resumed = outcome(start(model, folder, True, (0, 0, "none")), 0)
    if resumed is None or any("error" in one for one in resumed):
        return [*problems, f"unequal: resuming gave {resumed}"]
    files = final_files(folder)
    return problems + [f"unequal: {name}" for name in wanted | files if wanted.get(name) != files.get(name)]


def moments(times: int, count: int) -> list[tuple[int, int, str]]:
    """Returns (process, number, how) of so many moments, spread over the times that a process waits."""
    spread = [(place % 2, 2 + place * (times - 3) // max(1, count - 1), "kill") for place in range(count)]
    spread[count // 2] = (1, spread[count // 2][1], "memory")
    spread[-1] = (1, 2, "nan")
    return spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help=f"{TINY_MOMENTS} moments")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        model, folder, resume, number, how = given.worker
        worker(Path(model), Path(folder), resume == "1", int(number), how)
        return
    with tempfile.TemporaryDirectory() as scratch:
        model, folder = make_tiny_model(Path(scratch) / "model", hidden=32), Path(scratch) / "run"
        undisturbed = outcome(start(model, folder, False, (0, 0, "none")), 0)
        if undisturbed is None or any("error" in one for one in undisturbed):
            sys.exit(f"the undisturbed run failed: {undisturbed}")
        wanted, counts = final_files(folder), Counter[str]()
        harms = moments(undisturbed[0]["times"], TINY_MOMENTS if given.tiny else MOMENTS)
        for harm in harms:
            problems = problems_after(model, folder, wanted, harm)
            counts.update({problem.partition(":")[0] for problem in problems})
            for problem in problems:
                print(f"process {harm[0]}, {harm[2]} at {harm[1]}: {problem}")
    print(json.dumps({"moments": len(harms), **{kind: counts[kind] for kind in ("hung", "told", "lost", "unequal")}}))


if __name__ == "__main__":
    main()
