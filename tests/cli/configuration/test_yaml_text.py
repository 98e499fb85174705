"""Tests of YAML as text."""

from __future__ import annotations

import pytest

from qlora_lite.cli.configuration.yaml_text import Listed, Mapped, Node, Scalar, as_yaml, parsed
from qlora_lite.errors import ConfigError


def entries(text: str) -> dict[str, Node]:
    root = parsed(text, "run.yaml")
    assert isinstance(root, Mapped)
    return {key.text: value for key, value in root.items}


def test_nothing_is_guessed_about_what_is_written() -> None:
    found = entries("a: no\nb: 1e-4\nc: 010\nd: '5'\ne:\nf: ~\ng: 2024-01-02\nh: |\n  one\n")
    texts = {name: node.text for name, node in found.items() if isinstance(node, Scalar)}
    assert texts == {"a": "no", "b": "1e-4", "c": "010", "d": "5", "e": "", "f": "~", "g": "2024-01-02", "h": "one"}
    quoted = {name for name, node in found.items() if isinstance(node, Scalar) and node.quoted}
    assert quoted == {"d", "h"}
    assert {name for name, node in found.items() if isinstance(node, Scalar) and node.is_null} == {"e", "f"}


def test_lines_and_repeated_keys_are_kept() -> None:
    root = parsed("# comment\na: 1\n\na: [x, {y: z}]\n", "run.yaml")
    assert isinstance(root, Mapped) and [(key.text, key.line) for key, _ in root.items] == [("a", 2), ("a", 4)]
    listed = root.items[1][1]
    assert isinstance(listed, Listed) and listed.line == 4 and isinstance(listed.items[1], Mapped)
    assert parsed("# nothing\n", "run.yaml") == Mapped(1, ())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\n b: 2\n", "run.yaml is not YAML in line 2: mapping values are not allowed here; correct the line"),
        ("a: [1\n", "run.yaml is not YAML in line 2: while parsing a flow sequence"),
        ("a: 1\n\tb: 2\n", "run.yaml is not YAML in line 2"),
        ("a: 1\n---\nb: 1\n", "run.yaml is not YAML in line 2: expected a single document"),
        ("a: \x00\n", "run.yaml is not YAML: unacceptable character"),
        ("a: 1\nb: !env HOME\n", "run.yaml has the tag !env in line 2"),
        ("a: !!python/object/apply:os.system [ls]\n", "run.yaml has the tag tag:yaml.org,2002:python/object"),
        ("? [a]\n: 1\n", "run.yaml has a list or a mapping as a key in line 1"),
        ("a: &x [*x]\n", "run.yaml is nested too deeply in line 1"),
        ("[" * 1500, "run.yaml is nested too deeply"),
    ],
)
def test_what_is_not_read_is_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parsed(text, "run.yaml")
    assert str(raised.value).startswith(sentence) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "value", ["no", "1e-4", "a: b", "# x", "", "two\nlines", "\udcff/x", "ü" * 200, 3, 1e-05, True, None, ["a", "b"]]
)
def test_values_are_read_back(value: object) -> None:
    node = entries(as_yaml("key", value))["key"]
    if isinstance(node, Listed):
        assert [item.text for item in node.items if isinstance(item, Scalar)] == value
    else:
        assert isinstance(node, Scalar)
        assert node.text == {True: "true", None: "null", 1e-05: "1.0e-05"}.get(value, str(value))  # type: ignore[call-overload]
        assert node.quoted or not isinstance(value, str) or value not in ("", "no")
