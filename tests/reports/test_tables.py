"""Tests of the words and tables of a page."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_lite.reports.history import Damage, read_history
from qlora_lite.reports.tables import (
    damage_note,
    differences_table,
    duration,
    evaluation_table,
    event_list,
    known_settings,
    settings_tables,
    step_table,
    value_text,
    what_happened,
)

Make = Callable[..., Path]


def test_times_and_values_in_words() -> None:
    assert [duration(seconds) for seconds in (45, 100, 3600 * 3 + 1210)] == ["45 s", "2 min", "3 h 20 min"]
    values = (None, True, 2e-4, 1200, ["a", "b"], {"nf4": 14}, {}, "x", [1] * 9)
    assert [value_text(value) for value in values] == [
        *("–", "yes", "0.0002", "1,200", "a, b", "nf4 14", "–", "x", "1, 1, 1, 1, 1, 1, 1, 1 and 1 more")
    ]


def test_events_in_words(make_run: Make, read_html: Any) -> None:
    run = read_history(make_run())
    read = read_html("".join(event_list(run)))
    assert [part.text for part in read.all("p")] == [
        "The run started.",
        "The run was stopped by SIGTERM, and a checkpoint was written.",
        "The run went on after step 10.",
        "The run finished.",
    ]
    killed = replace(run, events=run.events[:1])
    assert "Nothing is noted after this: it was killed." in "".join(event_list(killed))
    assert "older than events.jsonl" in "".join(event_list(replace(run, events=[])))
    assert "early" in what_happened({"event": "finished", "step": 1, "early": True})
    lost = {"event": "observer_lost", "step": 1, "observer": "wandb", "reason": "no <network>"}
    assert what_happened(lost) == "wandb failed and is without the later steps: no <network>"
    assert "no &lt;network&gt;" in "".join(event_list(replace(run, events=[lost])))


def test_damage_is_told(make_run: Make) -> None:
    run = read_history(make_run())
    assert not list(damage_note(run))
    noted = replace(run, damage=[Damage("metrics.jsonl", n, "is not <JSON>") for n in range(1, 9)])
    text = "".join(damage_note(noted))
    assert "8 lines are damaged" in text and "metrics.jsonl:6 is not &lt;JSON&gt;, and 2 more" in text


def test_settings_and_their_differences(make_run: Make, read_html: Any) -> None:
    one, other = (read_history(make_run(name, learning_rate=rate)) for name, rate in (("one", 2e-4), ("two", 1e-3)))
    groups = known_settings(one)
    assert list(groups) == ["Settings", "Base", "Adapter", "Data"] and groups["Data"]["records"] == 1200
    assert groups["Adapter"]["rank"] == 16 and groups["Adapter"]["trained parameters"] == 1000
    assert "a/&lt;model&gt;" in "".join(settings_tables(one))
    rows = [part.text for part in read_html("".join(differences_table([one, other]))).all("tr")]
    assert [row.split() for row in rows[1:]] == [["Settings"], ["learning", "rate0.00020.001"]]
    assert "same settings" in "".join(differences_table([one, one]))


def test_figures_of_steps_and_evaluations(make_run: Make, read_html: Any) -> None:
    run = read_history(make_run())
    steps = read_html("".join(step_table(run)))
    assert next(steps.all("caption")).text == "Figures of 16 of 30 steps" and steps.sizes()[0] == 601 << 20
    text = "".join(evaluation_table(run))
    assert "2.0000 (best)" in text and text.count("(best)") == 1 and "exact match" in text
    assert not list(evaluation_table(replace(run, evaluations=[])))


def test_a_run_from_before_events_has_what_peft_wrote(make_run: Make) -> None:
    folder = make_run()
    (folder / "events.jsonl").unlink()
    assert list(known_settings(read_history(folder))) == ["Adapter", "Data"]
    (folder / "data.json").unlink()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps([]))
    assert "Nothing is noted" in "".join(settings_tables(read_history(folder)))
