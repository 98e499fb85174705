"""Tests of the shares of hidden tokens, and of which tokens are never hidden."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from qlora_lite.data.mixture import Mixture
from qlora_lite.data.tasks.batching import task_batches
from qlora_lite.data.tasks.labels import Labels
from qlora_lite.data.tasks.masking import Masking
from qlora_lite.errors import ConfigError
from tests.data.tasks.test_examples import made

MASK, SPECIAL = 3, frozenset({0, 1, 2, 3})
MASKING = Masking(MASK, SPECIAL, 1000)


def test_the_shares_are_those_of_bert() -> None:
    tokens = [0, *range(100, 900), 1] * 25
    given, labels = MASKING.hidden(tokens, random.Random(0))
    learned = [place for place, label in enumerate(labels) if label != -100]
    assert all(labels[place] == tokens[place] not in SPECIAL for place in learned)
    assert len(learned) / 20_000 == pytest.approx(0.15, abs=0.01)
    masked = sum(given[place] == MASK for place in learned) / len(learned)
    kept = sum(given[place] == tokens[place] for place in learned) / len(learned)
    assert masked == pytest.approx(0.8, abs=0.03) and kept == pytest.approx(0.1, abs=0.03)
    assert all(new == old for place, (new, old) in enumerate(zip(given, tokens, strict=True)) if labels[place] == -100)


def test_each_epoch_hides_other_tokens_and_each_run_the_same() -> None:
    examples = Mixture([made({"texts": [200]}, first=100)])

    def labels(seed: int = 0) -> list[list[int]]:
        words = {"pad_token_id": 0, "epochs": 2, "masking": MASKING}
        stream = task_batches(examples, Labels("hidden tokens"), 1, seed, **words)  # type: ignore[arg-type]
        return [batch["labels"][0].tolist() for batch in stream]

    first, second = labels()
    assert first != second and labels() == [first, second] != labels(1)


def test_a_tokenizer_needs_a_mask_token() -> None:
    with pytest.raises(ConfigError, match="this tokenizer has no mask token"):
        Masking.of(SimpleNamespace(mask_token_id=None))
    with pytest.raises(ConfigError, match="a masked language model needs masking"):
        task_batches(Mixture([made({"texts": [2]})]), Labels("hidden tokens"), 1, 0, pad_token_id=0)
