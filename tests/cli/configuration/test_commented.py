"""Tests of configurations as they are written: with comments, and read back as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_lite.cli.configuration import commented as module
from qlora_lite.cli.configuration.commented import check_of_a_run, commented, explained, resolved, with_whole_paths
from qlora_lite.cli.configuration.run_file import checked_values
from qlora_lite.cli.configuration.schema import options_of, settings_of
from qlora_lite.cli.configuration.yaml_text import parsed
from qlora_lite.cli.train import train
from qlora_lite.errors import CheckpointError

SETTINGS = settings_of(train)
DEFAULTS = {name: setting.default for name, setting in SETTINGS.items()}
NEEDED = {"model": "m", "data": ["a.jsonl"], "output": Path("out")}


def read(text: str) -> dict[str, Any]:
    return checked_values(parsed(text, "run.yaml"), "run.yaml", options_of(train))


def test_what_is_written_is_read_back() -> None:
    values = {
        **DEFAULTS,
        **NEEDED,
        "data": ["a.jsonl=0.7", "no"],
        "field": ["prompt=q: x", "completion=#a"],
        "task": "yes",
        "modules_to_save": "norm,lm_head",
        "max_grad_norm": "none",
        "keep_last": "7",
        "learning_rate": 1e-5,
        "memory_budget": "24000000000",
        "packing": True,
    }
    text = commented(SETTINGS.values(), values, ["# heading"])
    expected = {name: value for name, value in values.items() if value is not None}
    assert read(text) == {**expected, "output": "out", "max_grad_norm": "none", "keep_last": "7"}
    assert text.startswith("# heading\n") and max(map(len, text.splitlines())) <= module.WIDTH
    assert [line for line in text.splitlines() if line.startswith("# ---")] == [
        f"# {f' {section} ':-^77}" for section in ("Model", "Adapter", "Data", "Training", "Evaluation", "Output")
    ]


def test_a_setting_is_explained_by_its_help_its_values_and_its_default() -> None:
    text = commented(SETTINGS.values(), {**DEFAULTS, **NEEDED}, [])
    assert (
        "# Learning rate after the warm-up: cosine or linear (falling to the minimum),\n# or constant.\n"
        "# Values: cosine, linear or constant. Default: cosine.\nschedule: cosine\n"
    ) in text
    assert explained(SETTINGS["output"]) == ("Folder to write.", "Required.")
    assert "every eval_steps steps" in explained(SETTINGS["eval_data"])[0], "a file has keys, no options"
    assert not [name for name, setting in SETTINGS.items() if "--" in "".join(explained(setting))]


def test_settings_that_are_left_out_are_comments() -> None:
    text = commented(SETTINGS.values(), {**DEFAULTS, **NEEDED}, [], {"rank": "that of from_adapter"})
    assert "# rank: that of from_adapter\n" in text and "rank" not in read(text)


def test_of_two_alternatives_the_default_is_written() -> None:
    found = resolved(DEFAULTS)
    assert (found["steps"], found["epochs"], found["checkpointing"]) == (100, None, "full")
    found = resolved({**DEFAULTS, "epochs": 2.0, "memory_budget": "4GiB"})
    assert (found["steps"], found["epochs"], found["checkpointing"]) == (None, 2.0, None)
    assert found["eval_data"] is None and found["eval_share"] is None


def test_paths_are_whole_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("m", "folder"):
        (tmp_path / name).mkdir()
    (tmp_path / "a=1.jsonl").touch()
    given = ["a=1.jsonl", "a=1.jsonl=0.5", "folder:train=2", "org/name:train"]
    found = with_whole_paths(SETTINGS.values(), {**DEFAULTS, **NEEDED, "data": given})
    here = str(tmp_path)
    assert found["model"] == f"{here}/m" and found["output"] == tmp_path / "out" and found["from_adapter"] is None
    assert found["data"] == [f"{here}/{name}" for name in given[:3]] + given[3:]
    (tmp_path / "m").rmdir()
    assert with_whole_paths(SETTINGS.values(), {**DEFAULTS, **NEEDED})["model"] == "m", "an id on the hub"


def test_a_file_that_a_person_wrote_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    check_of_a_run(path)
    path.write_text(commented(SETTINGS.values(), {**DEFAULTS, **NEEDED}, module.RUN_HEADING), encoding="utf-8")
    check_of_a_run(path)
    path.write_text("model: m\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"run\.yaml was not written by a run, and this one would replace it"):
        check_of_a_run(path)
