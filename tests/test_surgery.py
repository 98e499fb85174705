"""Tests of replacing modules under every name without keeping the old ones alive."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qlora_lite.errors import ConfigError, TargetError
from qlora_lite.surgery import (
    check_all_matched,
    check_towers_loaded,
    described_by_pattern,
    distinct_ends,
    exchange_modules_,
    is_below,
    is_part_of_path,
    is_transposed_linear,
    leave_out_towers_,
    left_out_towers,
    matches_as_in_transformers,
    matching_pattern,
    name_matches,
    replace_modules_,
    tower_names,
)


def test_names_end_at_dots() -> None:
    assert name_matches("a.q_proj", "q_proj") and name_matches("a.b", "a.b")
    assert not name_matches("a.xq_proj", "q_proj")


def test_parts_of_paths_are_whole_names() -> None:
    for part in ("a", "tower", "0", "tower.0", "a.tower.0.q", "q"):
        assert is_part_of_path("a.tower.0.q", part)
    for other in ("tow", "a.0", "tower.0.", "q.a", "b"):
        assert not is_part_of_path("a.tower.0.q", other)
    with pytest.raises(TargetError, match=r"\['q_porj'\] matched no layer; this model has: k_proj, q_proj"):
        check_all_matched("target_modules", ["q_porj", "q_proj"], ["x.q_proj", "x.k_proj"])


def test_ends_of_names_are_short_and_match_nothing_else() -> None:
    names = ["layers.0.mlp.experts", "layers.1.mlp.experts", "layers.0.attn.down"]
    assert distinct_ends(names, ["layers.0.mlp.down", "head"]) == ["attn.down", "experts"]
    assert distinct_ends(["a.b"], ["x.a.b"]) == ["a.b"]  # nothing is short enough
    assert distinct_ends(["experts"], []) == ["experts"]


def test_patterns_match_as_in_transformers() -> None:
    for name in ("a.weights_proj", "a.xweights_proj", "model.norm", "model.norm.gate", "x.classifier"):
        assert matches_as_in_transformers(name, ["weights_proj", "model.norm", "classifier.weight"])
    assert not matches_as_in_transformers("model.normal", ["model.norm", "model.norm.weight"])
    assert not matches_as_in_transformers("a.weights_proj.b", ["weights_proj"])


def test_names_are_described_without_their_numbers() -> None:
    found = {"a.0.b": "one", "a.11.b": "one", "a.2.b": "two", "head": "one", "a.0.b1.2": "one"}
    assert described_by_pattern(found) == ["2 x a.*.b: one", "1 x a.*.b: two", "1 x head: one", "1 x a.*.b1.2: one"]
    assert described_by_pattern(found, ["a"]) == ["3 x a: one", "1 x a: two", "1 x head: one"]


def test_towers_are_the_modules_beside_the_decoder() -> None:
    def model_of(text: object) -> nn.Module:
        model = nn.ModuleDict({"model": nn.ModuleDict({"tower": nn.Linear(2, 2), "text": nn.Linear(2, 2)})})
        model["model"]["wrap"] = nn.ModuleDict({"bridge": nn.Linear(2, 2), "language": nn.Linear(2, 2)})
        model["head"] = nn.Linear(2, 2)
        model.base_model = model["model"]
        model.config = SimpleNamespace(get_text_config=lambda: text)
        model.get_decoder = lambda: model["model"]["wrap"]["language"]
        return model

    model = model_of(SimpleNamespace())
    assert tower_names(model) == ["model.tower", "model.text", "model.wrap.bridge"]
    assert leave_out_towers_(model) == left_out_towers(model) == tower_names(model)
    assert next(name for name, _ in model.named_parameters()).startswith("model.wrap.language")
    with pytest.raises(ConfigError, match=r"an export needs model\.tower, model\.text, model\.wrap\.bridge, which was"):
        check_towers_loaded(model, "an export")
    for text in (SimpleNamespace(is_encoder_decoder=True), None):  # its encoder reads the text, and no text part
        model = model_of(text)
        model.config.get_text_config = (lambda config=model.config: config) if text is None else (lambda t=text: t)
        assert tower_names(model) == []
        with pytest.raises(ConfigError, match="a ModuleDict has none"):
            leave_out_towers_(model)


def test_what_is_below_a_tower_begins_with_its_name() -> None:
    assert is_below("a.tower.0.q", ["a.tower"]) and is_below("a.tower", ["b", "a.tower"])
    assert not is_below("a.towers.q", ["a.tower"]) and not is_below("b.a.tower", ["a.tower"])


PARTS = st.sampled_from(["a", "q", "k+", "layers", "1", "11"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)
PATTERNS = st.one_of(
    NAMES, NAMES.map("^{}".format), st.sampled_from(["q|a", ".*", "layers.*q", "1.(a|q)", r"\d\.q", ""])
)


@given(patterns=st.lists(PATTERNS, max_size=4), name=NAMES)
def test_patterns_decide_as_in_peft(patterns: list[str], name: str) -> None:
    from peft.utils.other import get_pattern_key

    numbers = {pattern: number for number, pattern in enumerate(patterns)}
    found = matching_pattern(numbers, name)
    assert (None if found is None else numbers[found]) == numbers.get(get_pattern_key(numbers, name))


def test_shared_module_is_made_once_and_replaced_under_every_name() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(2, 2))})
    assert replace_modules_(model, lambda name, old: nn.Identity() if old is shared else None) == ["a"]
    assert isinstance(model["a"], nn.Identity) and model["b"][0] is model["a"]


def test_old_modules_are_let_go_one_by_one() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    old = [weakref.ref(layer) for layer in model]
    alive: list[int] = []

    def make(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, nn.Linear):
            return None
        alive.append(sum(ref() is not None for ref in old))
        return nn.Identity()

    replace_modules_(model, make)
    assert alive == [3, 2, 1]


def test_the_model_itself_is_refused() -> None:
    with pytest.raises(TargetError, match="container"):
        replace_modules_(nn.Linear(2, 2), lambda name, module: nn.Identity())


def test_transposed_linear_layers_are_gpt2s_alone() -> None:
    from transformers.pytorch_utils import Conv1D

    assert is_transposed_linear(Conv1D(4, 3))
    assert not any(
        map(is_transposed_linear, (nn.Linear(3, 4), nn.Conv1d(3, 4, 1), type("Conv1D", (nn.Linear,), {})(3, 4)))
    )


def test_exchanging_reaches_every_place_a_module_is_registered_in() -> None:
    shared, new = nn.Linear(2, 2), nn.ReLU()
    model = nn.Sequential(shared, nn.Sequential(shared, nn.Tanh()))
    exchange_modules_(model, {id(shared): new})
    assert model[0] is new and model[1][0] is new and type(model[1][1]) is nn.Tanh
    with pytest.raises(TargetError, match="the model itself is the ReLU"):
        exchange_modules_(new, {id(new): shared})
