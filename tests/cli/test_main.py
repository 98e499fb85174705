"""Tests of the command line as a process, with good and with bad input."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_lite.cli.main import _with_resume_command, main
from qlora_lite.training.metrics import StepMetrics
from qlora_lite.training.run_folder import RunFolder

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_help_needs_nothing_heavy(run: Run) -> None:
    heavy = "[name for name in ('torch', 'transformers', 'rich.table') if name in sys.modules]"
    program = f"import sys, qlora_lite.cli.main; print({heavy})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    for command in ((), ("data",), ("train",), ("merge",), ("quantize",), ("profile",), ("plan",), ("env",)):
        assert run(*command, "--help").returncode == 0


INTERRUPTED = """
import os, signal, sys
class Interrupting:
    def find_spec(name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting)
from qlora_lite.cli.__main__ import main
print([name for name in ("typer", "dataclasses", "json") if name in sys.modules], flush=True)
main()
"""


@pytest.mark.parametrize("imported", ["qlora_lite.cli.main", "typer", "qlora_lite.cli.train", "qlora_lite.signals"])
def test_ctrl_c_while_the_program_imports_is_one_line(imported: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED, imported, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "stopped by SIGINT before anything was done\n")
    assert done.stdout == "[]\n", "the first file imports next to nothing"


def test_the_program_begins_with_the_file_that_takes_ctrl_c() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '\nqlora-lite = "qlora_lite.cli.__main__:main"\n' in text
    done = subprocess.run(
        [sys.executable, "-m", "qlora_lite.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert "init" in done.stdout and "qlora-lite" in done.stdout


def test_simulated_a_command_is_quoted_for_the_shell_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train", "--data", r"C:\my data\a.jsonl"]
    assert _with_resume_command("stopped", words).endswith(r"qlora-lite train --data 'C:\my data\a.jsonl' --resume")
    monkeypatch.setattr(sys, "platform", "win32")
    assert _with_resume_command("stopped", words).endswith(r'qlora-lite train --data "C:\my data\a.jsonl" --resume')


def test_a_stopped_run_says_the_command_that_goes_on_with_it(
    tiny_folder: Path, memory_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = memory_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"number {n}"}) for n in range(5)))
    words = ["train", "--model", tiny_folder, "--data", data, "--steps", 4, "--rank", 2, "--dropout", 0.1, "--output"]

    def command(*given: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["qlora-lite", *map(str, given)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().err

    real = RunFolder.finish_step

    def finish_step(writer: RunFolder, metrics: StepMetrics) -> None:
        real(writer, metrics)
        if metrics.step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(RunFolder, "finish_step", finish_step)
    status, said = command(*words, memory_path / "run", "--overwrite")
    monkeypatch.setattr(RunFolder, "finish_step", real)
    last = said.splitlines()[-1]
    assert status == 143 and last.startswith("stopped by SIGTERM after step 2 of 4; ")
    again = shlex.split(last.partition("; go on with: qlora-lite ")[2])
    assert again == [*map(str, words), str(memory_path / "run"), "--resume"]
    status, said = command(*again)
    assert status == 0 and "going on after step 2 from" in said
    assert command(*words, memory_path / "whole")[0] == 0
    ends = [(memory_path / run / "adapter/adapter_model.safetensors").read_bytes() for run in ("run", "whole")]
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("merge", "--model", "{m}", "--adapter", "nowhere", "--output", "{t}/o"), 1, "does not exist"),
        (("merge", "--model", "/nowhere/x", "--adapter", "a", "--output", "{t}/o"), 1, "/nowhere/x does not exist"),
        (("merge", "--model", "{m}", "--adapter", "a", "--output", "{t}/o", "--dtype", "int4"), 2, "got 'int4'"),
        (("merge", "--model", "{m}", "--adapter", "a", "--output", "{t}/o", "--verify", "no.jsonl"), 1, "no.jsonl"),
        (("train", "--model", "{m}", "--data", "nowhere.jsonl", "--output", "{t}/o"), 1, "nowhere.jsonl"),
        (("profile", "--model", "{m}", "--format", "nf5"), 2, "got 'nf5'"),
        (("profile", "--model", "{m}", "--html", "{t}/report.txt"), 2, "must be named *.html; got"),
        (
            ("profile", "--model", "{m}", "--html", "{m}/config.json/a.html"),
            1,
            "is not a folder that may be written to",
        ),
        (("profile", "--model", "{m}", "--png", "{t}"), 2, "must be named *.png; got"),
        (
            ("quantize", "--model", "{m}", "--output", "{t}/o", "--format", "none"),
            2,
            "must be one of nf4, fp4, int8; got 'none'",
        ),
        (("profile", "--model", "{m}", "--rows", "0"), 2, "rows must be at least 1"),
        (("train", "--model", "{m}"), 2, "Missing option"),
        (("train", "--steps", "many"), 2, "Invalid value for '--steps'"),
        (("train", "--stepz", "2"), 2, "No such option: --stepz"),
        (("merge", "m", "--model", "{m}", "--adapter", "a", "--output", "{t}/o"), 2, "(m); see qlora-lite merge"),
        (("destroy",), 2, "No such command 'destroy'; see qlora-lite --help"),
    ],
)
def test_bad_input_is_one_sentence(
    run: Run, words: tuple[str, ...], status: int, message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    done = run(*(word.format(m=tiny_folder, t=tmp_path) for word in words))
    assert done.returncode == status, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_message_holds_nothing_that_a_terminal_obeys(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"\x1b[31mred\x07": "a"}), encoding="utf-8")
    done = run("train", "--model", tiny_folder, "--data", data, "--output", tmp_path / "out")
    assert done.returncode == 1 and "unknown shape with keys \\x1b[31mred\\x07; use one of" in done.stderr
    assert "\x1b" not in done.stderr and "\x07" not in done.stderr
