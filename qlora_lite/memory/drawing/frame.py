"""What the HTML pages of this package have in common: one document without scripts or network, light and dark."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from importlib.resources import files

BASE_SHEET = "base.css"


def document(title: str, style: str, body: Iterable[str], head: str = "") -> str:
    """Returns the text of a page. body: lines of HTML. head: more of its head, as HTML."""
    text = "\n".join(body)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"{head}<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{text}\n</main>\n"
        "</body>\n</html>\n"
    )


def style_sheet(package: str, name: str) -> str:
    """Returns the common style sheet and that of a page, a file of a package."""
    sheets = (files("qlora_lite.memory.drawing") / BASE_SHEET, files(package) / name)
    return "".join(sheet.read_text(encoding="utf-8") for sheet in sheets)


def colour_variables(light: str, dark: str) -> str:
    """Returns the rule for declarations of variables on light backgrounds, and that for dark ones."""
    return f":root{{{light}}}\n@media (prefers-color-scheme: dark){{:root{{{dark}}}}}\n"


def figure_html(name: str, value: str, note: str = "") -> str:
    """Returns one of the figures below a headline. value: HTML. name, note: text."""
    return f"<div><dt>{escape(name)}</dt><dd>{value}<small>{escape(note)}</small></dd></div>"
