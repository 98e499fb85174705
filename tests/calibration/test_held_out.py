"""Tests of the comparison on held-out text, against plain torch on the logits of the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from qlora_lite import architecture
from qlora_lite.calibration.held_out import Comparison


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("LlamaConfig", {}), ("Gemma2Config", {"final_logit_softcapping": 2.0}), ("CohereConfig", {"logit_scale": 0.3})],
)
def test_it_is_the_divergence_of_the_logits(
    small_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, family: str, sizes: dict[str, Any]
) -> None:
    monkeypatch.setattr("qlora_lite.calibration.held_out.LOGIT_BYTES", 5 * 4 * 64)  # five tokens at once
    model = small_model(family, **sizes)
    ids, mask = torch.randint(0, 64, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    found, counts = Comparison(), mask[:, 1:].bool()
    with torch.no_grad():
        hidden = architecture.hidden_states(model, batch)
        other = hidden + torch.randn_like(hidden)
        first = model(**batch).logits[:, :-1][counts].double()
    found.add(model, batch, "plain", {"plain": hidden, "other": other})
    with torch.no_grad():
        model.model.forward = lambda **_: type(
            "Output",
            (),
            {
                "last_hidden_state": other,
                "past_key_values": None,
                "hidden_states": None,
                "attentions": None,
                "__getitem__": lambda self, key: other,
            },
        )()
        second = model(**batch).logits[:, :-1][counts].double()
    targets = ids[:, 1:][counts]
    assert found.tokens == len(targets) == 9
    for name, logits in (("plain", first), ("other", second)):
        assert found.perplexity(name) == pytest.approx(math.exp(F.cross_entropy(logits, targets)), rel=1e-4)
    kl = (first.softmax(-1) * (first.log_softmax(-1) - second.log_softmax(-1))).sum(-1).mean()
    assert found.mean_kl("other") == pytest.approx(float(kl), rel=1e-2)
