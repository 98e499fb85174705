"""Tests of scores against their definitions, written out."""

from __future__ import annotations

import pytest
import torch

from qlora_lite.training.objective.scores import macro_f1, pearson, scores


def test_f1_is_the_mean_over_classes() -> None:
    decided, labels = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 1, 1, 1, 0])
    # class 0: 1 right of 2 given, 2 true; class 1: 1 of 1 given, 3 true; class 2: none of 2 given, 0 true
    assert macro_f1(decided, labels) == pytest.approx((0.5 + 0.5 + 0.0) / 3)
    assert scores("classes", decided, labels) == {"accuracy": pytest.approx(0.4), "f1": pytest.approx(1 / 3)}
    ignored = torch.tensor([0, -100, 1, -100, -100])
    assert scores("words", decided, ignored) == {"accuracy": 1.0, "f1": 1.0}


def test_correlation_and_squared_error() -> None:
    found, expected = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2.0, 1.0, 5.0])
    wanted = float(torch.corrcoef(torch.stack([found, expected]))[0, 1])
    assert scores("numbers", found, expected) == {"pearson": pytest.approx(wanted), "mse": pytest.approx(1.0)}
    assert pearson(torch.ones(3), expected) is None


def test_pairs_and_several_classes() -> None:
    assert scores("preferences", torch.tensor([1, 0, 1, 1]), torch.ones(4)) == {"accuracy": 0.75}
    assert scores("similar texts", torch.tensor([1, 0]), torch.ones(2)) == {"recall_at_1": 0.5}
    assert scores("targets", torch.tensor([5, 6, 7]), torch.tensor([5, 7, -100])) == {"accuracy": 0.5}
    decided, labels = torch.tensor([[1, 0, 0], [1, 1, 0]]), torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    found = scores("several classes", decided, labels)
    assert found == {"accuracy": 0.5, "f1": pytest.approx((2 / 3 + 1) / 2)}, "the third class occurs nowhere"
    assert scores("several classes", decided * 0, labels * 0)["f1"] is None
