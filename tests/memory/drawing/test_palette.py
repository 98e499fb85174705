"""Tests of the colors of categories."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.drawing.palette import DARK, LIGHT, luminance, text_colour_on

# Machado, Oliveira, Fernandes (2009), table of severity 1.0: linear RGB as it is seen.
SEEN = {
    "by most": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "without red": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "without green": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
    "without blue": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
}
# Ottosson's OKLab: linear RGB to cones, and their cube roots to lightness and two opponent axes.
CONES = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
AXES = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)


def oklab(colour: str, seen: str) -> torch.Tensor:
    shares = torch.tensor([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)], dtype=torch.float64)
    linear = torch.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    matrix, cones, axes = (torch.tensor(rows, dtype=torch.float64) for rows in (SEEN[seen], CONES, AXES))
    return axes @ (cones @ (matrix @ linear).clamp(0, 1)).pow(1 / 3)


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_every_two_categories_stay_apart(colours: dict[Category, str], seen: str) -> None:
    assert tuple(colours) == tuple(Category)
    points = {key: oklab(colour, seen) for key, colour in colours.items()}
    distances = {(a, b): 100 * float((points[a] - points[b]).norm()) for a, b in combinations(Category, 2)}
    closest = min(distances, key=distances.__getitem__)
    assert distances[closest] >= 10, (closest, distances[closest])


def test_text_can_be_read_on_every_colour() -> None:
    assert luminance("#ffffff") == pytest.approx(1) and luminance("#000000") == 0
    assert luminance("#ff0000") == pytest.approx(0.2126)
    assert (text_colour_on("#ffffff"), text_colour_on("#000000")) == ("#000000", "#ffffff")
    for colour in (*LIGHT.values(), *DARK.values()):
        one, other = sorted((luminance(colour) + 0.05, luminance(text_colour_on(colour)) + 0.05))
        assert other / one >= 4.5  # WCAG 2, contrast (minimum)
