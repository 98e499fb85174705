"""Reports with all kinds of entries, and an HTML reader, for tests of code that shows reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

import pytest

from qlora_lite.memory.breakdown import Category, MemoryBreakdown
from qlora_lite.memory.report import MemoryReport, PhaseMemory, Timeline

MIB = 1 << 20
WITHOUT_END = {"meta", "wbr", "br"}
ODD_NAME = 'x.<b>&"bold"\''


@dataclass
class Element:
    """An element of a page. `text` is its own text and that of the elements inside, in order."""

    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    inside: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else part.text for part in self.inside)

    @property
    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()

    def all(self, tag: str, kind: str | None = None) -> Iterator[Element]:
        """Every element inside with this tag, and this class if one is given."""
        for part in self.inside:
            if isinstance(part, Element):
                if part.tag == tag and (kind is None or kind in part.classes):
                    yield part
                yield from part.all(tag, kind)

    def rows(self) -> list[list[str]]:
        """The texts of a table's cells."""
        return [[part.text for part in row.inside if isinstance(part, Element)] for row in self.all("tr")]

    def sizes(self) -> list[int]:
        return [int(data.attributes["value"]) for data in self.all("data")]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].inside.append(element)
        if tag not in WITHOUT_END:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].inside.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].inside.append(data)


@pytest.fixture(scope="session")
def read_html() -> Callable[[str], Element]:
    """Returns a function that parses a page and checks that every element is closed."""

    def read(text: str) -> Element:
        reader = _Reader()
        reader.feed(text)
        reader.close()
        (root,) = reader.open
        return root

    return read


def split(activations: int) -> MemoryBreakdown:
    sizes = {(Category.BASE_WEIGHT, f"layers.{n}.mlp.base_layer"): 16 * MIB for n in range(4)}
    sizes |= {(Category.ADAPTER, f"layers.{n}.mlp"): MIB // 3 for n in range(4)}
    sizes |= {(Category.ACTIVATION, f"layers.{n}"): activations // 4 for n in range(4)}
    return MemoryBreakdown({**sizes, (Category.TEMPORARY, ODD_NAME): 8 * MIB, (Category.OTHER, None): MIB})


def timeline(*peaks: MemoryBreakdown) -> Timeline:
    """A timeline with one phase for each peak, which rises to it and falls again."""
    points = [(None, MemoryBreakdown({(Category.BASE_WEIGHT, None): 16 * MIB}))]
    for name, peak in zip(("forward", "back<ward>"), peaks, strict=True):
        half = MemoryBreakdown({key: size // 2 for key, size in peak.items()})
        points += [(name, half), (name, peak), (name, half)]
    sizes = {key: tuple(point.by_category()[key] for _, point in points) for key in Category}
    return Timeline(tuple(name for name, _ in points), sizes)


@pytest.fixture
def measured() -> MemoryReport:
    """A report measured on a CPU, with names that need escaping."""
    first, second = split(40 * MIB), split(60 * MIB)
    phases = (
        PhaseMemory("forward", 2, 1.5, 100 * MIB, 300 * MIB, 450 * MIB, live_peak=first.total(), breakdown=first),
        PhaseMemory(
            "back<ward>", 2, 3.25, 300 * MIB, 310 * MIB, 440 * MIB, None, None, second.total(), second, ODD_NAME
        ),
        PhaseMemory("export", 1, resident_peak=460 * MIB),
    )
    return MemoryReport(phases, timeline=timeline(first, second))


@pytest.fixture
def predicted() -> MemoryReport:
    """A predicted report of the same work, without the export and without counters of a process."""
    first, second = split(44 * MIB), split(57 * MIB)
    phases = (
        PhaseMemory("forward", 1, live_peak=first.total(), breakdown=first),
        PhaseMemory("back<ward>", 1, live_peak=second.total(), breakdown=second),
    )
    return MemoryReport(phases, rehearsed=True, timeline=timeline(first, second))


@pytest.fixture
def on_device() -> MemoryReport:
    """A report of an accelerator's counters, without traced storages."""
    phases = (
        PhaseMemory("load", 1, 2.0, allocated_peak=700 * MIB, reserved_peak=704 * MIB),
        PhaseMemory("step", 9, 4.0, allocated_peak=900 * MIB, reserved_peak=1000 * MIB),
    )
    return MemoryReport(phases, context_bytes=300 * MIB)
