"""One colour for each category, on a light and on a dark background.

Neighbours in a stack differ in lightness. Every two colours are at least 10 apart in OKLab x 100, also for
the three kinds of colour blindness as simulated by Machado, Oliveira and Fernandes (2009). Tests check the distances.
"""

from __future__ import annotations

from qlora_lite.memory.breakdown import Category

LIGHT = {
    Category.BASE_WEIGHT: "#403f7b",
    Category.QUANT_STATE: "#88b4ed",
    Category.ADAPTER: "#4c999a",
    Category.GRADIENT: "#446e3f",
    Category.OPTIMIZER_STATE: "#e1b767",
    Category.ACTIVATION: "#db764e",
    Category.TEMPORARY: "#8c548d",
    Category.OTHER: "#caced5",
}
DARK = {
    Category.BASE_WEIGHT: "#5182c1",
    Category.QUANT_STATE: "#a5dbf9",
    Category.ADAPTER: "#49b7b7",
    Category.GRADIENT: "#306036",
    Category.OPTIMIZER_STATE: "#decc8e",
    Category.ACTIVATION: "#d87f66",
    Category.TEMPORARY: "#6f397a",
    Category.OTHER: "#6e7176",
}


def luminance(colour: str) -> float:
    """Returns the relative luminance of `#rrggbb`, between 0 and 1 (WCAG 2)."""
    shares = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def text_colour_on(colour: str) -> str:
    """Returns black or white, whichever has more contrast with the background `colour` (WCAG 2 contrast ratio)."""
    light = luminance(colour) + 0.05
    return "#000000" if light / 0.05 > 1.05 / light else "#ffffff"
