"""Tests of the figures of a calibration, as text and as JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qlora_lite.calibration.held_out import Comparison
from qlora_lite.calibration.report import CalibrationReport, LayerErrors, render

COMPARED = Comparison(
    100, {"16-bit": 230.25850929940458, "rounded": 300.0, "calibrated": 250.0}, {"rounded": 20.0, "calibrated": 5.0}
)
REPORT = CalibrationReport(
    format="nf4",
    data_sha256="ab" * 32,
    tokens=8192,
    held_out_tokens=100,
    seconds=12.3456,
    layers={"layers.0.q": LayerErrors(0.01, 0.004), "layers.1.q": LayerErrors(0.02, 0.012)},
    rounded={"layers.0.experts": "a stack of experts' matrices", "layers.1.experts": "a stack of experts' matrices"},
    held_out=COMPARED,
)


def test_json_has_every_layer_and_the_comparison() -> None:
    found = json.loads(json.dumps(REPORT.to_json()))
    assert found["layers"]["layers.1.q"] == {"rounded": 0.02, "calibrated": 0.012}
    assert found["mean_error_ratio"] == pytest.approx(0.5) and found["rounded"].keys() == REPORT.rounded.keys()
    assert found["held_out"]["perplexity"]["16-bit"] == pytest.approx(10)
    assert found["held_out"]["kl"] == {"rounded": 0.2, "calibrated": 0.05}
    assert replace(REPORT, held_out=None).to_json()["held_out"] is None
    assert REPORT.figures()["kl_calibrated"] == 0.05 and REPORT.figures()["layers_rounded"] == 2


def test_the_table_and_the_sentence() -> None:
    lines = render(REPORT).splitlines()
    assert lines[0].strip() == "100 tokens of held-out text"
    assert [cell.strip() for cell in lines[6].split("│")[1:4]] == ["calibrated", "12.182", "0.0500"]
    assert lines[-3].endswith("the calibrated model is 0.25 times as far from the 16-bit one as rounding.")
    assert lines[-1] == "  2 x layers.*.experts: a stack of experts' matrices"
    worse = replace(REPORT, held_out=replace(COMPARED, kl={"rounded": 1.0, "calibrated": 1.5}))
    assert "no nearer to the 16-bit one than rounding: give more text" in render(worse)
    assert render(replace(REPORT, held_out=None, rounded={})) == (
        "There was no held-out text, so what calibration brought was not measured."
    )
