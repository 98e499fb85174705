"""Does any file make a reader fail with an error that is not a QLoRAError? Inputs are guided by coverage (atheris).

    python -m pip install atheris                       # in a separate environment: nothing else here needs it
    python tests/reliability/fuzz_files.py              # two minutes for each target
    python tests/reliability/fuzz_files.py --seconds 10 --targets index run

Each target runs in a process of its own with the package instrumented, starting from sound files and from those of
bad_files.py. A reader must raise a QLoRAError or return what an independent reader of the format returns
(bad_inputs.py). Every other outcome is kept as a file `crash-*` in the folder that the table names. The last line is
JSON: executions, branches, seconds and findings of each target.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SECONDS = 120
LONGEST_INPUT = 1 << 16
LONGEST_SECONDS = 10  # for one input
NO_ATHERIS = "atheris is not installed: python -m pip install atheris (a separate environment will do)"
EXECUTIONS = re.compile(r"stat::number_of_executed_units: +(\d+)")
COVERAGE = re.compile(r"cov: (\d+)")


def _atheris() -> Any:
    try:
        return importlib.import_module("atheris")
    except ImportError:
        sys.exit(NO_ATHERIS)


def _fuzz(name: str, words: list[str]) -> None:
    """Runs one target until its time is over or it crashes, and ends the process."""
    atheris = _atheris()
    with atheris.instrument_imports(include=["qlora_lite"]):
        targets = importlib.import_module("fuzz_targets")
    target = targets.TARGETS[name]
    folder = Path(tempfile.mkdtemp(dir=os.environ["FUZZ_FOLDER"]))
    reader = target.reader(folder)
    corpus = Path(words[-1])
    for number, seed in enumerate(target.seeds()):
        (corpus / f"{number:04d}").write_bytes(seed)
    atheris.Setup([sys.argv[0], *words], reader)
    atheris.Fuzz()


def fuzzed(name: str, seconds: int, kept: Path) -> dict[str, Any]:
    """Returns the figures of one target, run in a process of its own."""
    began = time.monotonic()
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as scratch:
        corpus = Path(scratch) / "corpus"
        corpus.mkdir()
        words = [f"-max_total_time={seconds}", f"-max_len={LONGEST_INPUT}", f"-timeout={LONGEST_SECONDS}"]
        words += ["-rss_limit_mb=4096", "-print_final_stats=1", f"-artifact_prefix={kept}/{name}-", str(corpus)]
        command = [sys.executable, __file__, "--target", name, *words]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env={**os.environ, "FUZZ_FOLDER": scratch},
        )
    if done.returncode not in (0, 77) and "stat::number_of_executed_units" not in done.stderr:
        sys.exit(f"{name} did not start: {done.stderr.strip()[-2000:]}")
    executions, covered = EXECUTIONS.search(done.stderr), COVERAGE.findall(done.stderr)
    found = sorted(path.name for path in kept.glob(f"{name}-*"))
    if found:
        (kept / f"{name}.log").write_text(done.stderr)
    return {
        "executions": int(executions[1]) if executions else 0,
        "branches": int(covered[-1]) if covered else 0,
        "seconds": round(time.monotonic() - began),
        "found": found,
    }


def main() -> None:
    if sys.argv[1:2] == ["--target"]:
        _fuzz(sys.argv[2], sys.argv[3:])
    _atheris()
    names = list(importlib.import_module("fuzz_targets").TARGETS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=SECONDS, help="time for each target")
    parser.add_argument("--targets", nargs="+", choices=names, default=names)
    parser.add_argument("--kept", type=Path, help="folder for crashes; a new one without it")
    options = parser.parse_args()
    kept = options.kept or Path(tempfile.mkdtemp(prefix="fuzzed-"))
    kept.mkdir(exist_ok=True)
    found = {name: fuzzed(name, options.seconds, kept) for name in options.targets}
    table = Table("target", "executions", "branches", "seconds", f"found (in {kept})")
    for name, figures in found.items():
        table.add_row(
            name, *(f"{figures[key]:,}" for key in ("executions", "branches", "seconds")), " ".join(figures["found"])
        )
    Console(width=140).print(table)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
