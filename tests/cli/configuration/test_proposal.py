"""Tests of the settings that are proposed, and of the file that they become."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_lite.cli.configuration import proposal
from qlora_lite.cli.configuration.proposal import Shape, as_file, examples_of_step, held_out_share, proposed, steps_of
from qlora_lite.cli.configuration.run_file import checked_values
from qlora_lite.cli.configuration.schema import options_of, settings_of
from qlora_lite.cli.configuration.yaml_text import parsed
from qlora_lite.cli.train import train
from qlora_lite.errors import RehearsalError
from qlora_lite.planning import batch_choice
from qlora_lite.planning.batch_choice import BatchChoice
from qlora_lite.planning.memory_plan import DeviceMemory

MEMORY = DeviceMemory(1 << 30, 0, False)


@pytest.mark.parametrize(("examples", "each"), [(1, 2), (60, 2), (100, 4), (399, 8), (400, 16), (10**6, 16)])
def test_a_step_has_a_power_of_two_of_examples(examples: int, each: int) -> None:
    assert examples_of_step(examples) == each


def test_few_records_are_not_held_out_and_not_many() -> None:
    assert held_out_share(19) is None and held_out_share(20) == 0.1 and held_out_share(50_000) == 0.01


def test_the_shape_is_the_batch_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        batch_choice, "choose_batch", lambda model, setup, memory: BatchChoice(4, 128, 2, 300 << 20, 900 << 20)
    )
    found = proposal.shape_within("m", MEMORY, 200, 256, None)
    reason = "4 x 128 tokens are predicted to need at most 900.0 MiB of 1,024.0 MiB."
    assert found == Shape(4, 2, 128, "300MiB", reason, 900 << 20)

    def refuse(*given: object) -> None:
        raise RehearsalError("shapes depend on values")

    monkeypatch.setattr(batch_choice, "choose_batch", refuse)
    for why_not, why in ((None, "shapes depend on values"), ("the records have images", "the records have images")):
        found = proposal.shape_within("m", MEMORY, 200, 256, why_not)
        assert (found.rows, found.gradient_accumulation, found.checkpointing, found.predicted) == (1, 8, "full", None)
        assert why in found.reason


def test_the_file_has_every_setting_with_its_reason_and_is_a_configuration() -> None:
    data: Any = SimpleNamespace(examples=range(180), held_out=range(20))
    shape = Shape(4, 2, 128, "300MiB", "4 x 128 tokens are predicted to need 1 GiB.", 1 << 30)
    assert steps_of(180, 2.0, shape) == 45
    answers = {
        "model": "m",
        "task": None,
        "data": ["a.jsonl", "b.jsonl"],
        "epochs": 2.0,
        "output": Path("out"),
        "eval_share": 0.1,
    }
    found = proposed(answers, data, shape, 200)
    text = as_file(settings_of(train), found)
    values = checked_values(parsed(text, "run.yaml"), "run.yaml", options_of(train))
    assert values.keys() == found.keys() and values["data"] == ["a.jsonl", "b.jsonl"] and values["output"] == "out"
    assert (values["epochs"], values["eval_steps"], values["checkpointing"]) == (2, 5, "300MiB")
    assert "# 2 passes over the examples: 45 steps.\nepochs: 2\n" in text
    assert "and longer ones than this are\n# shortened." in text and "`qlora-lite train out --resume`" in text
    lines = text.splitlines()
    settings = [at for at, line in enumerate(lines) if line and not line.startswith(("#", "- "))]
    assert len(settings) == len(found) and all(lines[at - 1].startswith("# ") for at in settings)
    assert max(map(len, lines)) <= 80
    assert proposed({**answers, "task": "embedding"}, data, shape, 100)["task"][0] == "embedding"
    alone = proposed({**answers, "eval_share": None}, data, shape, 100)
    assert not {"eval_share", "eval_steps"} & alone.keys() and alone["save_steps"][0] == 5
