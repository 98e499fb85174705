"""Tests of `qlora-lite profile` as a process."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_it_shows_what_was_measured_beside_what_was_predicted(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    words = ("profile", "--model", tiny_folder, "--rank", 2, "--rows", 1, "--tokens", 16, "--json")
    done = run(*words, "--html", tmp_path / "new" / "report.html", "--png", tmp_path / "timeline.png")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert "at the peak, in load, " in done.stdout and "predicted - measured" in done.stdout
    page = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    assert all(f'value="{phase["live_peak"]}"' in page for phase in report["phases"])
    assert len(report["timeline"]["phases"]) > 100
    measured, predicted = ({p["name"]: p["live_peak"] for p in r["phases"]} for r in (report, report["predicted"]))
    assert measured == predicted and not report["rehearsed"] and report["predicted"]["rehearsed"]
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    again = run(*words, "--html", tmp_path / "new" / "report.html")
    assert again.returncode == 1 and "report.html exists; name another file" in again.stderr and not again.stdout


def test_counters_alone_tell_the_process_and_predict_nothing(run: Run, tiny_folder: Path) -> None:
    done = run("profile", "--model", tiny_folder, "--rank", 2, "--tokens", 16, "--mode", "phases", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["predicted"] is None and report["timeline"] is None
    assert all(p["live_peak"] is None and p["resident_peak"] > 0 for p in report["phases"])
    assert "resident" in done.stdout and "predicted - measured" not in done.stdout


def test_tensors_that_the_model_has_no_place_for_are_passed_over_if_asked_to(
    run: Run, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "v_head.weight": torch.ones(1, 32)}, folder / "model.safetensors")
    words = ("profile", "--model", folder, "--rank", 2, "--tokens", 16, "--mode", "phases")
    refused = run(*words)
    assert refused.returncode == 1 and "1 tensors belong to no module: v_head.weight" in refused.stderr
    done = run(*words, "--ignore-unexpected")
    assert done.returncode == 0 and "1 x v_head.weight: passed over" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--mode", "all"), 2, "must be full or phases; got 'all'"),
        (("--mode", "phases", "--png", "{t}/a.png"), 2, "needs --mode full"),
        (("--snapshot", "{t}/s.pickle"), 2, "and none is available; leave the snapshot out"),
    ],
)
def test_bad_input_is_one_sentence(
    run: Run, words: tuple[str, ...], status: int, message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    done = run("profile", "--model", tiny_folder, *(word.format(t=tmp_path) for word in words))
    assert done.returncode == status and message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr and not done.stdout
