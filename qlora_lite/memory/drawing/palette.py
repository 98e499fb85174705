"""One colour for each category, for a light and for a dark ground.

The lightness of neighbours in a stack differs and hues were spread so that every two of the eight stay apart for the
three kinds of colour blindness too: by 10 in OKLab x 100 and more, by the simulation of Machado, Oliveira and
Fernandes (2009), which the tests repeat.
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
    """Of `#rrggbb`, between 0 and 1 (WCAG 2, relative luminance)."""
    shares = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def ink_on(colour: str) -> str:
    """Black or white, whichever has more contrast on the colour."""
    light = luminance(colour) + 0.05
    return "#000000" if light / 0.05 > 1.05 / light else "#ffffff"
