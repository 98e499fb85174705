"""Tests of configuration files: values of every type, and everything that may be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_lite.cli.configuration.run_file import checked_values, read_run_file
from qlora_lite.cli.configuration.schema import options_of
from qlora_lite.cli.configuration.yaml_text import parsed
from qlora_lite.cli.train import train
from qlora_lite.errors import ConfigError


def values(text: str) -> dict[str, Any]:
    return checked_values(parsed(text, "run.yaml"), "run.yaml", options_of(train))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("learning_rate: 1e-4", 1e-4),  # a string to PyYAML
        ("learning_rate: .5", 0.5),
        ("steps: 1_000", 1000),
        ("seed: 010", 10),
        ("packing: yes", True),
        ("double_quant: off", False),
        ("output: no", "no"),  # Norway
        ("model: 2024", "2024"),
        ("bias: none", "none"),
        ("max_grad_norm: none", "none"),
        ("max_grad_norm: 0.3", "0.3"),
        ("keep_last: 3", "3"),
        ("data: a.jsonl", ["a.jsonl"]),
        ("data: [a.jsonl=0.7, 'b:train=0.3']", ["a.jsonl=0.7", "b:train=0.3"]),
        ("field: {prompt: question, completion: reply}", ["prompt=question", "completion=reply"]),
        ("field: [prompt=question]", ["prompt=question"]),
        ("target_modules: [q_proj, v_proj]", "q_proj,v_proj"),
        ("target_modules: 're:.*(q|k){1,2}_proj'", "re:.*(q|k){1,2}_proj"),
        ("trainable_token_indices: [7, 9]", "7,9"),
        ("layers_to_transform: 0-7,12", "0-7,12"),
        ("modules_to_save: ''", ""),
        ("modules_to_save: []", ""),
        ("init_lora_weights: pissa", "pissa"),
        ("task: LlamaForCausalLM", "LlamaForCausalLM"),
        ("checkpointing: 300MiB", "300MiB"),
    ],
)
def test_a_value_is_what_the_setting_makes_of_it(text: str, value: object) -> None:
    assert list(values(text).values()) == [value]
    assert type(next(iter(values(text).values()))) is type(value)


@pytest.mark.parametrize("text", ["epochs:", "epochs: ~", "eval_data: null", "patience: Null"])
def test_null_leaves_a_setting_to_the_run(text: str) -> None:
    assert values(text) == {}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("\n\nlearnig_rate: 1", "unknown key learnig_rate in run.yaml line 3; did you mean learning_rate?"),
        ("lora_r: 16", "unknown key lora_r in run.yaml line 1; did you mean rank?"),
        ("xyzzy: 1", "unknown key xyzzy in run.yaml line 1; qlora-lite train --help lists all settings"),
        ("training: {steps: 1}", "unknown key training in run.yaml line 1; settings do not stand in sections"),
        ("resume: true", "resume is no setting of a run in run.yaml line 1; give --resume to the command"),
        ("rank: 4\nrank: 8", "rank is given twice in run.yaml line 2; it stands in line 1 already"),
        ("rank: sixteen", "rank must be a whole number, got sixteen in run.yaml line 1"),
        ("rank: '16'", "rank must be a whole number, got '16' in run.yaml line 1"),
        ("rank: 16.0", "rank must be a whole number, got 16.0"),
        ("rank: 0x10", "rank must be a whole number, got 0x10"),
        ("rank: null", "rank must be a whole number, got null"),
        ("rank: [16]", "rank must be a whole number, got a list"),
        ("learning_rate: .nan", "learning_rate must be a number, got .nan"),
        ("learning_rate: 1e999", "learning_rate must be a number, got 1e999"),
        ("learning_rate: 1,5", "learning_rate must be a number, got 1,5"),
        ("packing: 1", "packing must be true or false, got 1"),
        ("packing: 'yes'", "packing must be true or false, got 'yes'"),
        ("model:", "model must be a text, got nothing"),
        ("output: {a: b}", "output must be a path, got a mapping"),
        ("data: []", "data must be a text or a list of texts, at least one, got a list"),
        ("data: [{path: a.jsonl}]", "data must be a text or a list of texts, got a list"),
        ("schedule: cosin", "schedule must be cosine, linear or constant, got cosin"),
        ("format: no", "format must be nf4, fp4, int8 or none, got no"),
        ("keep_last: 1.5", "keep_last must be all or a whole number, got 1.5"),
        ("target_modules: ['a,b']", "target_modules must be a list of names without commas"),
        ("steps: 3\nepochs: 1", "run.yaml has steps in line 1 and epochs in line 2, and a run takes one of them"),
        ("[a, b]", "run.yaml must hold keys with values, as learning_rate: 2e-4; got a list"),
    ],
)
def test_what_is_wrong_is_one_sentence_with_its_line(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        values(text)
    assert str(raised.value).startswith(sentence)


def test_all_mistakes_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        values("rank: x\nlora_alpha: 3\nsteps: 2\nsteps: 3\njson: true\n")
    assert str(raised.value) == (
        "run.yaml has 4 mistakes: line 1: rank must be a whole number, got x; "
        "line 2: unknown key lora_alpha (did you mean alpha?); "
        "line 4: steps is given twice (it stands in line 3 already); "
        "line 5: json is no setting of a run (give --json to the command)"
    )


def test_two_settings_of_which_one_has_its_default_are_no_contradiction() -> None:
    assert values("warmup_steps: 0\nwarmup_ratio: 0.03") == {"warmup_steps": 0, "warmup_ratio": 0.03}


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    good = tmp_path / "run.json"
    good.write_bytes(b'\xef\xbb\xbf{"rank": 4, "data": ["a"], "learning_rate": 1e-4}')
    assert read_run_file(good, train) == {"rank": 4, "data": ["a"], "learning_rate": 1e-4}
    binary, large = tmp_path / "a.yaml", tmp_path / "b.yml"
    binary.write_bytes(b"rank: \xff")
    large.write_bytes(b"#" * (2 << 20))
    for path, sentence in (
        (tmp_path / "data.jsonl", "(records are given with --data)"),
        (tmp_path / "missing.yaml", "missing.yaml does not exist; expected a configuration"),
        (binary, "a.yaml is not text in UTF-8: invalid start byte at byte 6"),
        (large, "expected a configuration, of at most 1,048,576"),
    ):
        with pytest.raises(ConfigError) as raised:
            read_run_file(path, train)
        assert sentence in str(raised.value)
