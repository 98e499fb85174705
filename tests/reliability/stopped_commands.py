"""Does a command that gets a signal end cleanly, wherever it is?

    python tests/reliability/stopped_commands.py            # SIGTERM, SIGINT and two SIGINT at every moment
    python tests/reliability/stopped_commands.py --tiny     # at a few of them

Each command runs in a process of its own, which gets the signal inside a chosen function: reading, training, saving,
packing in another thread, verifying, rehearsing, or in a finalizer. It must end with status 143 or 130, with one last
line on stderr and no traceback. No unfinished file may be left, the output must be complete or absent, and the state of
a run must be saved. A second SIGINT must end it at once. The last line is JSON: the number of stops, and of those with
problems.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from example_model import make_tiny_model
from killed_runs import final_files
from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized, save_adapter
from qlora_lite.checkpoints.files import UNFINISHED
from qlora_lite.cli.main import main as command_line
from qlora_lite.training.run_checkpoints import newest_intact_checkpoint

SECONDS = 120.0
ONCE, TWICE = 1, 2
TINY_MOMENTS = 5
TRAIN = "train --model {model} --data {data} --output {out} --rank 2 --steps 3 --gradient-accumulation 2 --dropout 0.1"
EVALUATED = f"{TRAIN} --eval-share 0.4 --eval-steps 1 --patience 2 --learning-rate 0.05 --no-token-cache"
MERGE = "merge --model {model} --adapter {adapter} --output {out} --verify {data}"
QUANTIZE = "quantize --model {model} --output {out}"
DATA = "data {data} --model {model} --html {out}/page.html"
PLAN = "plan --model {model} --memory 1GiB --tokens 16 --seq 16"
PROFILE = "profile --model {model} --rank 2 --rows 1 --tokens 8 --html {out}/page.html"


@dataclass(frozen=True)
class Moment:
    """Call number `call` of a function (`module:owner.name`). steps: the steps that a run has done by then."""

    words: str
    function: str
    call: int = 1
    steps: int | None = None


MOMENTS = (
    Moment(TRAIN, "training.objective.losses:linear_cross_entropy", 6, steps=1),
    Moment(MERGE, "checkpoints.safetensors_write:_Writer.write", 5),
    Moment(PLAN, "memory.trace:StorageTrace._gone", 300),
    Moment(QUANTIZE, "checkpoints.load:TensorLoader.load_", 3),
    Moment(EVALUATED, "training.evaluation:Evaluator.make", 2, steps=1),
    Moment(MERGE, "export.lazy_model:LazyModel.head_inputs"),
    Moment(EVALUATED, "training.evaluation:Evaluator.make", 1, steps=0),
    Moment(EVALUATED, "training.evaluation:_in_memory", 2, steps=1),
    Moment(EVALUATED, "training.run_folder:RunFolder.finish_evaluation", 3, steps=2),
    Moment(TRAIN, "checkpoints.load:TensorLoader.load_", 3),
    Moment(TRAIN, "data.tokenization:tokenize_sources"),
    Moment(TRAIN, "lora.init:initialize_", 2),
    Moment(TRAIN, "training.objective.losses:linear_cross_entropy", 1, steps=0),
    Moment(TRAIN, "training.objective.losses:linear_cross_entropy", 9, steps=2),
    Moment(TRAIN, "training.step:TrainingStep._update", 1, steps=1),
    Moment(TRAIN, "training.run_folder:RunFolder.before_update", 2, steps=2),
    Moment(f"{TRAIN} --save-steps 1", "training.run_state:Run.write", 2, steps=2),
    Moment(f"{TRAIN} --save-steps 1", "training.run_state:base_fingerprint", 1, steps=1),
    Moment(f"{TRAIN} --save-steps 1", "training.run_folder:RunFolder.finish", 1, steps=3),
    Moment(f"{TRAIN} --memory-budget 2GiB", "planning.training_rehearsal:run_fake_training"),
    Moment(MERGE, "checkpoints.hub:_transformers"),
    Moment(MERGE, "export.merged:load_adapter_"),
    Moment(MERGE, "export.weight_rows:RepackedRows._packed", 2),
    Moment(MERGE, "export.merged:write_companion_files"),
    Moment(MERGE, "checkpoints.atomic_folder:_rename_over"),
    Moment(QUANTIZE, "checkpoints.safetensors_write:_Writer.write", 5),
    Moment(PLAN, "planning.training_rehearsal:run_fake_training", 2),
    Moment(PROFILE, "memory.trace:StorageTrace._gone", 100),
    Moment(PROFILE, "training.step:TrainingStep._update", 2),
    Moment(f"{PROFILE} --mode phases", "training.step:TrainingStep._update", 1),
    Moment(PROFILE, "planning.training_rehearsal:run_fake_training"),
    Moment(PROFILE, "checkpoints.files:check_writable", 2),
    Moment(f"{DATA} --no-token-cache", "data.token_arrays:TokenWriter.append", 3),
    Moment(DATA, "data.listing:pieces_of", 2),
    Moment(DATA, "checkpoints.files:check_writable", 2),
    Moment("inspect {adapter}", "lora.peft.describe:describe_adapter"),
    Moment("env", "compute.environment:environment"),
)


def _owner(function: str) -> tuple[Any, str]:
    module, _, path = function.partition(":")
    *above, name = path.split(".")
    return functools.reduce(getattr, above, importlib.import_module(f"qlora_lite.{module}")), name


def _arm(moment: Moment, number: int, times: int) -> None:
    """Makes this process get the signal in that call, and a second one while it sleeps there if `times` is TWICE."""
    owner, name = _owner(moment.function)
    function, calls = getattr(owner, name), itertools.count(1)

    @functools.wraps(function)
    def signalled(*given: Any, **named: Any) -> Any:
        if next(calls) == moment.call:
            if times == TWICE:
                threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
            os.kill(os.getpid(), number)
            if times == TWICE:
                time.sleep(SECONDS)
        return function(*given, **named)

    setattr(owner, name, signalled)
    for module in list(sys.modules.values()):  # modules that imported the function by its name
        if getattr(module, "__name__", "").startswith("qlora_lite") and getattr(module, name, None) is function:
            setattr(module, name, signalled)


def _ended(words: list[str], said: Path, arm: Callable[[], None]) -> int | None:
    """Returns the exit status of the command line in a forked process; None if it does not end."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            errors, nothing = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), os.open(os.devnull, os.O_WRONLY)
            os.dup2(errors, 2)
            os.dup2(nothing, 1)
            # A background job of a shell inherits that SIGINT is ignored, and a command keeps that setting.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.argv = ["qlora-lite", *words]
            arm()
            command_line()
        except SystemExit as ended:
            status = int(ended.code or 0)
        finally:
            sys.stderr.flush()
            os._exit(status)
    until = time.monotonic() + SECONDS / 2
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _wrong_files(out: Path, moment: Moment, times: int) -> list[str]:
    found = [f"{path.name} is left" for path in out.parent.rglob(f".*{UNFINISHED}")]
    if times == ONCE:  # after two, it stays, as after a kill; no process holds it
        found += [f"{path} is left" for path in out.parent.rglob(".run.lock")]
    if not moment.words.startswith("train"):
        whole = (out / "config.json").is_file() or (out / "page.html").is_file()
        return found + (["part of the output is there"] if out.is_dir() and any(out.iterdir()) and not whole else [])
    if moment.steps is None:
        return found + (["the folder of a run is there"] if out.exists() else [])
    if times == ONCE:
        path, skipped = newest_intact_checkpoint(out)
        steps = 0 if path is None else int(path.name.removeprefix("step-"))
        found += [f"the saved state is that of step {steps}, not {moment.steps}"] * (steps != moment.steps)
        found += skipped
    return found


def wrong_after(scratch: Path, moment: Moment, number: int, times: int) -> list[str]:
    """Returns the problems of a command that got this signal in that moment."""
    out, said = scratch / "work" / "out", scratch / "said"
    shutil.rmtree(out.parent, ignore_errors=True)
    out.parent.mkdir()
    paths = {"out": out, **{name: scratch / name for name in ("model", "adapter", "data")}}
    words = moment.words.format(**paths).split()
    status = _ended(words, said, functools.partial(_arm, moment, number, times))
    lines = said.read_text().splitlines()
    found = [] if status == 128 + number else [f"it ended with {status}"]
    steps = [line for line in lines if line.startswith("step ")]
    last = lines[-1] if lines else ""
    if len(lines) != len(steps) + 1 or not last.startswith("stopped"):
        found.append(f"its last lines were {lines[-3:]}")
    if (words[0] == "train") != ("; go on with: qlora-lite train" in last):
        found.append(f"its last line was {last!r}")
    found += _wrong_files(out, moment, times)
    if words[0] == "train" and not found:
        again = [*words, "--resume"]
        status = _ended(again, said, lambda: None)
        found += [] if status == 0 else [f"resuming ended with {status}: {said.read_text()[-300:]}"]
        if moment.words == EVALUATED and not found:
            found += _differences(words, out, said)
    return found


def _differences(words: list[str], out: Path, said: Path) -> list[str]:
    """Returns the files of an undisturbed run that the resumed run does not have; it has more checkpoints."""
    whole = out.with_name("whole")
    status = _ended([str(whole) if word == str(out) else word for word in words], said, lambda: None)
    if status != 0:
        return [f"the undisturbed run ended with {status}"]
    wanted, found = final_files(whole), final_files(out)
    wanted["run.yaml"] = wanted["run.yaml"].replace(str(whole).encode(), str(out).encode())  # it names its folder
    return [f"{name} differs" for name in wanted if name != "names" and wanted[name] != found.get(name)]


def make_inputs(scratch: Path, make_model: Callable[[Path], Path]) -> None:
    """Writes a model, an adapter and records into a folder."""
    model = load_quantized(make_model(scratch / "model"), QuantConfig())
    add_lora_(model, LoraConfig(2, target_modules=["q_proj", "down_proj"]))
    save_adapter(model, scratch / "adapter")
    (scratch / "data").write_text("".join(json.dumps({"text": f"number {n}"}) + "\n" for n in range(5)))


def stops(
    scratch: Path, moments: tuple[Moment, ...], kinds: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, list[str]]]:
    """Yields (name of the stop, problems). kinds: pairs of a signal and how often it is sent."""
    for moment, (number, times) in itertools.product(moments, kinds):
        name = f"{moment.words.split()[0]}, {moment.function} {moment.call}, {times} {signal.Signals(number).name}"
        yield name, wrong_after(scratch, moment, number, times)


KINDS = ((signal.SIGTERM, ONCE), (signal.SIGINT, ONCE), (signal.SIGINT, TWICE))


def all_stops(
    scratch: Path, make_model: Callable[[Path], Path], first: int | None = None
) -> list[tuple[str, list[str]]]:
    """Tries each kind of stop at every moment, or one kind at each of the `first` moments."""
    make_inputs(scratch, make_model)
    if first is None:
        return list(stops(scratch, MOMENTS, KINDS))
    return [found for at, moment in enumerate(MOMENTS[:first]) for found in stops(scratch, (moment,), (KINDS[at % 3],))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="try a few moments")
    tiny = parser.parse_args().tiny
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = all_stops(Path(folder), functools.partial(make_tiny_model, hidden=32), TINY_MOMENTS if tiny else None)
    for name, problems in found:
        for problem in problems:
            print(f"{name}: {problem}")
    print(json.dumps({"stopped": len(found), "wrong": sum(bool(problems) for _, problems in found)}))


if __name__ == "__main__":
    main()
