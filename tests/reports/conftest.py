"""A run in its folder, as `train` writes it, made without training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_lite.training.metrics import Evaluation, StepMetrics, line_of
from qlora_lite.training.observers import event_line

FACTS = {
    "settings": {"steps": 30, "learning_rate": 2e-4, "max_grad_norm": 1.0, "schedule": "cosine"},
    "base": {"name": "a/<model>", "class": "LlamaForCausalLM", "packed": {"nf4": 14}},
    "adapters": {"layers": 14, "rank": 16, "alpha": 32.0, "variant": "lora", "trained_parameters": 1000},
}


def step(number: int, loss: float) -> StepMetrics:
    return StepMetrics(number, loss, 0.5, 1e-4, 1000, 500.0, (600 + number) << 20)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Makes the folder of a run of 30 steps that was stopped after 10 and went on; returns its path."""

    def make(name: str = "run", steps: int = 30, evaluations: bool = True, **facts: Any) -> Path:
        folder = tmp_path / name
        (folder / "adapter").mkdir(parents=True)
        lines = [line_of(Evaluation(0, 4.0, {"perplexity": math.exp(4.0), "exact_match": 0.0}, 2.0))] * evaluations
        for number in range(1, steps + 1):
            lines.append(line_of(step(number, 4.0 / number)))
            if evaluations and number % 10 == 0:
                held_out = {10: 2.5, 20: 2.0, 30: 2.25}[number]
                scores = {"perplexity": math.exp(held_out), "exact_match": number / 40}
                lines.append(line_of(Evaluation(number, held_out, scores, 2.0)))
        (folder / "metrics.jsonl").write_text("".join(lines))
        known = {**FACTS, "settings": {**FACTS["settings"], **facts}}
        events = [event_line("started", 0, known), event_line("stopped", 10, {"reason": "SIGTERM"})]
        events += [event_line("resumed", 10, known), event_line("finished", steps, {"early": False})]
        (folder / "events.jsonl").write_text("".join(events))
        (folder / "data.json").write_text(json.dumps({"records": 1200, "date": "2026-01-02", "sources": [{}]}))
        adapter = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
        (folder / "run.yaml").write_text("model: a/<model>\n")
        return folder

    return make
