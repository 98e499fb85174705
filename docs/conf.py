"""Settings of Sphinx, and how docstrings of the package become reStructuredText. `make docs` builds the pages."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator

import qlora_lite

project = "qlora_lite"
author = "qlora_lite authors"
version = release = qlora_lite.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "qlora_lite"
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False
myst_heading_anchors = 3
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # nn.Module.forward says nothing about these layers
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

FIELD = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): (.*)")
CODE = re.compile(r"(`+.+?`+)")


def parameter_names(described: object) -> set[str]:
    """The parameters of a function or a class, and the fields of a dataclass."""
    names = set(getattr(described, "__annotations__", {}))
    with contextlib.suppress(TypeError, ValueError):
        names |= set(inspect.signature(described).parameters)  # type: ignore[arg-type]
    return names


def escaped(text: str) -> str:
    """Text in which stars, bars and trailing underscores mean themselves; what is in backticks becomes literal."""
    parts = CODE.split(text)
    plain = [re.sub(r"([\\*|]|(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
    code = [f"``{part.strip('`')}``" for part in parts[1::2]]
    return "".join(piece for pair in zip(plain, [*code, ""], strict=True) for piece in pair)


def blocks(lines: list[str]) -> Iterator[list[str]]:
    """The paragraphs of a docstring, without the empty lines between them."""
    paragraph: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield paragraph
            paragraph = []


def converted(paragraph: list[str], names: set[str]) -> Iterator[str]:
    """One paragraph: indented text is code, `name: text` is a parameter, all else is prose."""
    if all(line.startswith("    ") for line in paragraph):
        yield from ("::", "", *paragraph, "")
        return
    in_item = False
    for line in paragraph:
        found = FIELD.fullmatch(line)
        if found and names.issuperset(found[1].split(", ")):
            yield from ("", f"- **{found[1]}**: {escaped(found[2])}")
            in_item = True
        elif line.startswith("- "):
            yield from ("", f"- {escaped(line[2:])}")
            in_item = True
        elif in_item and line.startswith(" "):
            yield f"  {escaped(line.lstrip())}"
        else:
            yield from ([""] if in_item else [])
            yield escaped(line.lstrip())
            in_item = False
    yield ""


def plain_docstring(app: object, what: str, name: str, described: object, options: object, lines: list[str]) -> None:
    """Docstrings are written to be read in the source; this makes reStructuredText of them, in place."""
    paragraphs = list(blocks(lines))
    if what == "module":  # the files of a room are for readers of the source
        paragraphs = paragraphs[:1]
    names = parameter_names(described)
    lines[:] = [line for paragraph in paragraphs for line in converted(paragraph, names)]


def plain_signature(
    app: object, what: str, name: str, described: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """`<factory>` is not an expression, and would keep Sphinx from reading the signature."""
    return None if signature is None else signature.replace("<factory>", "..."), returns


def setup(app: object) -> None:
    app.connect("autodoc-process-signature", plain_signature)  # type: ignore[attr-defined]
    app.connect("autodoc-process-docstring", plain_docstring)  # type: ignore[attr-defined]
