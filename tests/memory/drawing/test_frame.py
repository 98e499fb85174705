"""Tests of what HTML pages have in common."""

from __future__ import annotations

from typing import Any

from qlora_lite.memory.drawing.frame import colour_variables, document, figure_html, style_sheet


def test_a_page_loads_nothing_and_escapes_its_title(read_html: Any) -> None:
    text = document("<a> & b", "p{}", ["<p>one</p>", "<p>two</p>"], '<meta name="generator" content="x">\n')
    read = read_html(text)
    assert next(read.all("title")).text == "<a> & b" and [part.text for part in read.all("p")] == ["one", "two"]
    assert "default-src 'none'; style-src 'unsafe-inline'" in text and '<meta name="generator" content="x">' in text


def test_the_common_style_sheet_comes_before_that_of_a_page() -> None:
    style = style_sheet("qlora_lite.memory.drawing", "page.css")
    assert 0 < style.index("prefers-color-scheme: dark") < style.index(".treemap")
    assert colour_variables("--a:1;", "--a:2;").splitlines() == [
        ":root{--a:1;}",
        "@media (prefers-color-scheme: dark){:root{--a:2;}}",
    ]


def test_a_figure_escapes_its_words() -> None:
    assert figure_html("a<b", "<data>1</data>", "c&d") == (
        "<div><dt>a&lt;b</dt><dd><data>1</data><small>c&amp;d</small></dd></div>"
    )
