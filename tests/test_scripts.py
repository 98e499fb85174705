"""Runs every script of profiling/ and the long matrices with their small settings; each ends with its JSON line."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "profiling/base_formats.py": {
        "bf16",
        "int8 rows",
        "int8 rows, int8 activations",
        "nf4",
        "nf4, int8 embedding and head",
        "fp4",
    },
    "profiling/calibrated.py": {
        *("tokens", "loss_share", "kl_share", "worst_cell", "mixed", "mixed_kl", "bytes_ratio", "seconds"),
        *("cpu_seconds", "cells"),
    },
    "profiling/eight_billion.py": {
        "load_seconds",
        "load_peak",
        "resident",
        "train_peak",
        "step_seconds",
        "export_seconds",
        "export_above_resident",
    },
    "tests/reliability/endure.py": {
        "kills",
        "kills_lost",
        "full_disks",
        "full_disks_wrong",
        "stops",
        "stops_wrong",
        "bad_inputs",
        "bad_inputs_wrong",
        "resume_cases",
        "resume_unequal",
        "soak_steps",
        "soak_slope_bytes_per_step",
    },
    "tests/interop/matrix.py": {"cases", "passed", "refused_by_peft", "refused_by_us", "failed"},
    "profiling/generation.py": {"cpu", "check", "nf4_batch1", "nf4_memory"},
    "profiling/largest_batch.py": {"memory", "rows"},
    "profiling/learn_like_peft.py": {
        "base_perplexity",
        "ours_perplexity",
        "peft_perplexity",
        "perplexity_ratio",
        "in_peft",
        "largest_loss_difference",
        "rounding_yardstick",
        "differences",
        "variants",
    },
    "profiling/packing.py": {
        "pack_speed_ratio",
        "pack_temporaries",
        "codes_equal",
        "unpack_speed_ratio",
        "unpack_temporaries",
        "unpacked_bytes",
    },
    "profiling/row_fill.py": {"log-normal 512", "log-normal 2048", "uniform 512"},
    "profiling/profiler_cost.py": {"plain_seconds", "phases_ratio", "full_ratio"},
    "profiling/plan_vs_measured.py": {
        "cases",
        "mean_error",
        "worst_error",
        "worst_category_error",
        "peft_worst_error",
        "peft_worst_category_error",
        "peft_worst_other",
        "resident_worst_error",
        "published_mean_error",
        "published_worst_error",
        "published_worst_under",
        "published_held_aside_worst_error",
        "today_mean_error",
        "today_worst_error",
        "verdicts_right",
    },
    "profiling/step_growth.py": {"tokens", "layers"},
    "profiling/step_memory.py": {"model", "phases"},
    "profiling/streaming_io.py": {
        "load_time_ratio",
        "load_peak_ratio",
        "export_time_ratio",
        "export_extra_bytes",
        "merge_time_ratio",
        "merge_peak_bytes",
        "merge_peak_growth",
    },
    "profiling/tokenizing.py": {
        "cpu",
        "records",
        "tokens",
        "learned_tokens",
        "bytes_per_token",
        "seconds_100k",
        "second_start_seconds",
        "peak_mib_above_tokenizer",
        "anonymous_peak_mib",
        "time_ratio",
        "ratios",
        "seconds",
        "cpu_seconds",
        "labels_equal_trl",
        "growth_160_over_80",
        "peak_growth",
    },
    "profiling/varied_lengths.py": {"ours", "ours_with_all_programs", "peft", "peak_ratio", "time_ratio"},
    "profiling/sharded.py": {
        *("gradient_error", "base_share", "gathered_ratio", "time_ratio", "read_ratio", "load_peak", "moments"),
        *("hung", "told", "lost", "unequal"),
    },
    "profiling/out_of_core.py": {
        *("time_ratio", "cpu_ratio", "resident_ratio", "unequal", "memory_peak", "memory_step_seconds"),
        *("disk_peak", "disk_step_seconds", "empty_process", "on_disk", "bytes_read"),
    },
    "profiling/versus_peft.py": {"nf4_full", "floor"},
    "profiling/waiting.py": {"cpu", "threads", "checkpointing", "settings"},
    "profiling/learn_like_trl.py": {"cpu", "sft"},
    "profiling/versus_trl.py": {"cpu", "sft_full"},
}
ARGUMENTS = {
    "profiling/generation.py": ["nf4", "--check"],
    "profiling/learn_like_peft.py": ["--variants", "pissa"],
    "profiling/versus_trl.py": ["sft_full"],
    "profiling/versus_peft.py": ["nf4_full", "floor"],  # every case would take a minute of starting processes
    "profiling/waiting.py": ["passive"],
}
# Tested elsewhere, or not a program.
NOT_RUN_HERE = {
    "profiling/sharded_base.py",
}


def test_no_script_is_forgotten() -> None:
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "profiling").glob("*.py")}
    assert found == {name for name in {*SCRIPTS, *NOT_RUN_HERE} if not name.startswith("tests/")}


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_script_ends_with_its_figures(script: str, tmp_path: Path, command_server: Any) -> None:
    command = [command_server.python, str(ROOT / script), "--tiny", *ARGUMENTS.get(script, [])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    assert set(figures) == SCRIPTS[script]
    if "failed" in figures:
        assert figures["failed"] == 0 and 2 * figures["passed"] > figures["cases"]
    if "settings" in figures:
        assert set(figures["settings"]) == {"default", "one thread", "passive"}
        # The workers' programs run in forks of another process here, whose core seconds are not those of the workers.
        assert all(own["wall"] > 0 and own["waiting_share"] <= 1 for own in figures["settings"].values())
    if "kills" in figures:
        assert figures["kills"] > 2 and figures["bad_inputs"] > 100 and figures["resume_cases"] > 1 < figures["stops"]
        wrong = "kills_lost", "stops_wrong", "bad_inputs_wrong", "resume_unequal"
        assert {figures[name] for name in wrong} == {0}
        assert not figures["full_disks_wrong"] and figures["full_disks"] != 0
    if "uniform 512" in figures:
        assert all(case["first_fit_fill"] < case["best_fit_fill"] <= 1 for case in figures.values())
    if "labels_equal_trl" in figures:  # the ways are compared only if they do the same work
        assert figures["labels_equal_trl"] is True
        assert 300 == figures["records"] < figures["learned_tokens"] < figures["tokens"]
        assert 4 < figures["bytes_per_token"] < 5
        assert (
            set(figures["seconds"])
            > set(figures["ratios"])
            == {
                "trl, SFTTrainer, 2 processes",
                "datasets.map, prefixes, 2 processes",
                "datasets.map, no labels, 2 processes",
            }
        )
    if "on_disk" in figures:
        assert figures["unequal"] == 0 and figures["on_disk"] > 1 << 20
    if "nf4_memory" in figures:
        assert {format: found["wrong"] for format, found in figures["check"].items()} == {"nf4": [], "int8": []}
        assert all(found["equal"] > 5 for found in figures["check"].values())
    if "mixed_kl" in figures:  # a random model's perplexity says nothing
        assert figures["mixed_kl"] < 0.7 and figures["kl_share"] < 0.7 and figures["bytes_ratio"] <= 1
    if "perplexity_ratio" in figures:  # after three steps, both programs have the same adapter
        assert abs(figures["perplexity_ratio"] - 1) < 1e-3
        assert figures["differences"]["both in fp32"]["largest"] < 1e-4
        assert figures["ours_perplexity"] < figures["base_perplexity"]


TALKING = """
import sys
sys.stderr.write("warning\\n" * 40000)
print('{"loss": 1}', flush=True)
if input() == "" and sys.argv[1] == "ends":
    sys.exit("no memory")
print('{"loss": 2}', flush=True)
"""


def test_a_worker_may_warn_more_than_a_pipe_holds(tmp_path: Path, import_script: Callable[[str], Any]) -> None:
    """A peer of generation.py warned at each product, and both sides waited for ever."""
    (tmp_path / "talking.py").write_text(TALKING)
    worker_class = import_script("profiling/parts/step_processes.py").Worker

    def started(word: str) -> Any:
        return worker_class(SimpleNamespace(to_json=lambda: word, steps=1), tmp_path / "talking.py")

    goes_on, ends = started("goes on"), started("ends")
    goes_on.step()
    assert goes_on.figures == [{"loss": 1}, {"loss": 2}]
    with pytest.raises(SystemExit, match="no memory"):
        ends.step()
