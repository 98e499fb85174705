"""Draws a memory report: an HTML page, SVG and PNG.

In reading order:

palette   a colour for each category, on light and dark backgrounds
treemap   bytes of modules as nested rectangles
svg       timeline and treemap as SVG
tables    the tables of the HTML page
frame     what pages have in common: the document and its style sheet base.css
page      the HTML page, with its style sheet page.css
png       the timeline as a PNG
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.memory.drawing.page import write_page as write_page
    from qlora_lite.memory.drawing.png import write_chart as write_chart

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "page": "write_page",
        "png": "write_chart",
    },
)
