"""Tests of the page of runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.reports.history import read_history
from qlora_lite.reports.page import COLOURS, report_page, write_report
from qlora_lite.system import locked

Make = Callable[..., Path]


def headings(read: Any) -> list[str]:
    return [part.text for part in read.all("h2")]


def figures(read: Any) -> dict[str, str]:
    return {next(box.all("dt")).text: next(box.all("dd")).text for box in next(read.all("dl")).all("div")}


def test_the_page_of_a_run(make_run: Make, read_html: Any) -> None:
    text = report_page([read_history(make_run())])
    read = read_html(text)
    assert next(read.all("h1")).text == "Run run" and next(read.all("span", "badge")).text == "finished"
    assert next(next(read.all("p", "headline")).all("strong")).text == "2.0000"
    assert (
        "held-out loss after step 20, the lowest of 3 evaluations; perplexity 7.389, exact match 0.5"
        in text.replace("<b>", "").replace("</b>", "")
    )
    told = figures(read)
    assert told["steps"] == "30of 30" and told["loss"] == "0.13334.0000 in step 1" and told["time"].startswith("68 s")
    assert told["exact match"] == "0.750 before the first step" and told["peak memory"].startswith("630.0 MiB")
    assert headings(read) == ["Loss", "Over the steps", "What happened", "The run", "In numbers"]
    assert "model: a/&lt;model&gt;" in text and "<model>" not in text and 'http-equiv="refresh"' not in text
    assert "<script" not in text and "src=" not in text and "href=" not in text


def test_pictures_are_drawn_for_both_widths(make_run: Make) -> None:
    text = report_page([read_history(make_run())])
    assert text.count('<svg class="chart"') == 2 * (1 + 6)


def test_a_run_before_its_first_step_and_one_of_one_step(make_run: Make, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    with locked(tmp_path / "new" / ".run.lock"):
        text = report_page([read_history(tmp_path / "new")], reload_seconds=5)
    assert (
        "no step is finished yet" in text and '<meta http-equiv="refresh" content="5">' in text and ">running<" in text
    )
    single = report_page([read_history(make_run("single", steps=1, evaluations=False))])
    assert "loss of <b>step 1</b>" in single and '<circle class="run-1"' in single and "nan" not in single


def test_losses_that_are_not_finite_are_gaps(make_run: Make) -> None:
    folder = make_run(evaluations=False)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines[9:12]:
        line["loss"] = float("nan")
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = report_page([read_history(folder)])
    assert "3 steps have no finite loss, and are gaps" in text
    for line in lines:
        line["loss"] = float("inf")
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "No loss is a finite number." in report_page([read_history(folder)])


def test_several_runs_side_by_side(make_run: Make, read_html: Any) -> None:
    runs = [read_history(make_run(name, steps=steps)) for name, steps in (("one", 30), ("<two>", 20))]
    read = read_html(report_page(runs))
    sections = ["Side by side", "Loss", "Held-out loss", "Over the steps", "Differences"]
    assert headings(read) == [*sections, "What happened in one", "What happened in <two>"]
    rows = [part.text for part in next(read.all("table", "runs")).all("tr")]
    assert "one" in rows[1] and "30 of 30" in rows[1] and "<two>" in rows[2] and "20 of 30" in rows[2]
    for count in (0, len(COLOURS) + 1):
        with pytest.raises(ConfigError, match=f"a page shows 1 to {len(COLOURS)} runs; got {count}"):
            report_page([runs[0]] * count)


def test_a_page_replaces_another_page_and_nothing_else(make_run: Make, tmp_path: Path) -> None:
    run, path = read_history(make_run()), tmp_path / "page.html"
    write_report(path, [run], 5)
    write_report(path, [run])
    assert 'http-equiv="refresh"' not in path.read_text() and path.read_text().startswith("<!DOCTYPE html>")
    path.write_text("<p>mine</p>")
    with pytest.raises(CheckpointError, match=r"page.html exists and is not a page of report; name another file"):
        write_report(path, [run])
    with pytest.raises(ConfigError, match=r"the file must be named \*\.html"):
        write_report(tmp_path / "page", [run])
    assert path.read_text() == "<p>mine</p>"


def test_a_run_is_judged_by_what_its_best_adapter_was_chosen_by(make_run: Make) -> None:
    by_loss, other = read_history(make_run()), read_history(make_run("other", best_by="exact_match"))
    assert "<strong>2.0000</strong><span>held-out loss after <b>step 20</b>, the lowest of 3" in one_line(by_loss)
    text = one_line(other)
    assert (
        "<strong>0.75</strong><span>exact match after <b>step 30</b>, the highest of 3 evaluations; held-out " in text
    )
    assert other.figures()["best_exact_match"] == 0.75 and "best_exact_match" not in by_loss.figures()
    both = report_page([by_loss, other])
    assert "held-out loss 2.0000 at 20" in both and "exact match 0.75 at 30" in both


def one_line(run: Any) -> str:
    return report_page([run]).replace("\n", "")
