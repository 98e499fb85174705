"""Tests of `qlora-lite report` on a run of `train`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_a_run_is_drawn_and_wrong_folders_are_one_sentence(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    data, folder = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text("\n".join(json.dumps({"text": f"number {n}"}) for n in range(8)))
    words = ("train", "--model", tiny_folder, "--data", data, "--output", folder, "--rank", 2, "--steps", 3)
    done = run(*words, "--eval-share", 0.25, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    drawn = run("report", folder, "--json", "--watch")  # the run has ended, and so does the command
    assert drawn.returncode == 0, drawn.stderr
    figures = json.loads(drawn.stdout.splitlines()[-1])
    assert figures["last_loss"] == told["last_loss"] and figures["state"] == "finished" and figures["steps"] == 3
    assert figures["best_held_out_loss"] == told["held_out_loss_after"] and figures["damaged_lines"] == 0
    page = (folder / "report.html").read_text()
    assert figures["page"] == str(folder / "report.html") and "Run run" in page and "run.yaml" in page
    again = run("report", folder)
    assert again.returncode == 0 and f"page                {folder / 'report.html'}" in again.stdout
    resumed = run(*words, "--eval-share", 0.25, "--resume")
    assert resumed.returncode == 0, "a page in the folder of a run keeps it from going on"
    for given, status, said in (
        ((tmp_path / "runn",), 1, "name the --output folder of a run of train; did you mean"),
        ((tmp_path / "none",), 1, "none does not exist; name the --output folder of a run of train"),
        ((folder, data), 2, "a page of 2 runs belongs into none of their folders; name it with --output"),
        ((folder, folder, "--output", tmp_path / "p.html"), 2, "a run is named twice; name each once"),
        ((folder, "--output", data), 2, "the file must be named *.html"),
    ):
        refused = run("report", *given)
        assert refused.returncode == status and said in refused.stderr and len(refused.stderr.splitlines()) == 1
