"""YAML as text: what was written where, without any guess at its type; and values as YAML. The one file with PyYAML.

Of a scalar YAML would guess the type: `no` becomes false, `1e-4` a string, `010` eight. Here it stays the text that was
written, and the setting that it belongs to decides what it means.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_lite.errors import ConfigError

# What a value without a tag has. Others construct objects, or change what is written.
PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map")}
NULLS = ("", "~", "null", "Null", "NULL")


@dataclass(frozen=True)
class Scalar:
    """A text. quoted: whether it stands in quotes, or as a block of lines, and so cannot be a number."""

    line: int
    text: str
    quoted: bool

    @property
    def is_null(self) -> bool:
        """Whether nothing is written, or null."""
        return not self.quoted and self.text in NULLS

    def shown(self) -> str:
        """Returns the value for an error, shortened."""
        text = self.text if len(self.text) <= 40 else f"{self.text[:40]}..."
        return repr(text) if self.quoted else (text or "nothing")


@dataclass(frozen=True)
class Listed:
    """A list."""

    line: int
    items: tuple[Node, ...]

    def shown(self) -> str:
        """Returns the value for an error."""
        return "a list"


@dataclass(frozen=True)
class Mapped:
    """A mapping, with keys in their order, also those that occur twice."""

    line: int
    items: tuple[tuple[Scalar, Node], ...]

    def shown(self) -> str:
        """Returns the value for an error."""
        return "a mapping"


Node = Scalar | Listed | Mapped
# Deeper than any setting is.
DEEPEST = 4


def parsed(text: str, name: str) -> Node:
    """Returns what is written in a text of YAML. name: of the file, for errors.

    Raises ConfigError for text that is not YAML, several documents, tags, and keys that are not texts.
    """
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f" in line {mark.line + 1}"
        problem = " ".join(": ".join(str(part) for part in (error.context, error.problem) if part).split())
        raise ConfigError(f"{name} is not YAML{line}: {problem}; correct the line") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not YAML: {' '.join(str(error).split())}; correct the file") from None
    except RecursionError:
        raise ConfigError(f"{name} is nested too deeply for a configuration") from None
    return Mapped(1, ()) if root is None else _node(root, name, 0)


def _node(node: Any, name: str, depth: int) -> Node:
    import yaml

    line = node.start_mark.line + 1
    if node.tag not in PLAIN_TAGS:
        raise ConfigError(f"{name} has the tag {node.tag} in line {line}; tags have no meaning here, so leave it out")
    if depth > DEEPEST:
        raise ConfigError(f"{name} is nested too deeply in line {line}; settings are keys at the left margin")
    if isinstance(node, yaml.ScalarNode):
        return Scalar(line, node.value.rstrip("\n"), node.style is not None)
    if isinstance(node, yaml.SequenceNode):
        return Listed(line, tuple(_node(item, name, depth + 1) for item in node.value))
    return Mapped(line, tuple((_key(key, name), _node(value, name, depth + 1)) for key, value in node.value))


def _key(node: Any, name: str) -> Scalar:
    import yaml

    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{name} has a list or a mapping as a key in line {node.start_mark.line + 1}; keys are names")
    return Scalar(node.start_mark.line + 1, node.value, node.style is not None)


def as_yaml(key: str, value: object) -> str:
    """Returns the lines of a key with its value: a scalar, a list of scalars or a mapping of them."""
    import yaml

    width = float("inf")  # never folded
    return str(yaml.safe_dump({key: value}, default_flow_style=False, allow_unicode=True, width=width, sort_keys=False))
