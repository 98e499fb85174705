"""An HTML reader for tests of pages; the fixture `read_html` hands it on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

WITHOUT_END = {"meta", "wbr", "br"}


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


def read(text: str) -> Element:
    """Parses a page and checks that every element is closed."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    (root,) = reader.open
    return root
