"""Tests of what a run decided: through state.json, also as older runs wrote it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qlora_lite.choices import DEFAULTS, INTEGER_PRODUCTS
from qlora_lite.errors import CheckpointError
from qlora_lite.training.decisions import DECISIONS_SHAPE, Decisions
from qlora_lite.training.run_checkpoints import mismatches


def test_the_loss_that_a_run_chose_is_kept() -> None:
    for decisions in (
        Decisions(),
        Decisions("logits", "its head"),
        Decisions("logit-free", None, [1] * 5, 3, DEFAULTS),
    ):
        kept = Decisions.from_json(json.loads(json.dumps(decisions.to_json())))
        assert kept.loss == (decisions.loss or "logit-free") and kept.logits_reason == decisions.logits_reason
        assert kept.block_costs == decisions.block_costs and kept.halved_at == decisions.halved_at
        assert kept.choices == decisions.choices
        assert not list(mismatches(decisions.to_json(), DECISIONS_SHAPE))
    old: Any = {"own_loss_because": None, "dial": None, "halved_at": None}
    assert not list(mismatches(old, DECISIONS_SHAPE)) and list(mismatches({**old, "loss": 3}, DECISIONS_SHAPE)) == [
        "loss"
    ]
    assert Decisions.from_json(old).loss == "logit-free"
    assert Decisions.from_json(old).choices == DEFAULTS  # what there was before there were choices
    assert Decisions.from_json({**old, "choices": {INTEGER_PRODUCTS: "fp32"}}).choices == {
        **DEFAULTS,
        INTEGER_PRODUCTS: "fp32",
    }
    # That run took the loss of the model, which need not be right, so it is chosen again.
    assert Decisions.from_json({**old, "own_loss_because": "they differ"}).loss is None
    with pytest.raises(CheckpointError, match=r"state\.json has an unknown loss, 'quux'; known are: logit-free"):
        Decisions.from_json({**old, "loss": "quux"})
    for stored in ({"speed": "fast"}, {INTEGER_PRODUCTS: "fast"}, {INTEGER_PRODUCTS: ["fp32"]}):
        with pytest.raises(CheckpointError, match=r"state\.json has unknown choices: ['\"](speed|integer_products)="):
            Decisions.from_json({**old, "choices": stored})
