"""Bytes by category and module, as predictions and measurements both give them. Plain arithmetic, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum

from qlora_lite.errors import ConfigError


class Category(str, Enum):
    """What bytes are used for, in the order of all tables and stacks.

    BASE_WEIGHT: frozen weights and buffers, packed or not. QUANT_STATE: scales and tables that unpacking them needs.
    ADAPTER: trained parameters. GRADIENT: gradients of trained parameters. OPTIMIZER_STATE: moments and step counts.
    ACTIVATION: waits for the backward pass. TEMPORARY: lives shorter than that. OTHER: of unknown origin.

    A new category is one line here and its colours in drawing/palette.py.
    """

    _value_: str
    label: str  # in texts and pictures
    heading: str  # the label with the line breaks of a narrow column

    def __new__(cls, value: str, label: str = "", heading: str = "") -> Category:
        member = str.__new__(cls, value)
        member._value_, member.label, member.heading = value, label, heading
        return member

    BASE_WEIGHT = ("base_weight", "base weights", "base\nweights")
    QUANT_STATE = ("quant_state", "quantization state", "quant.\nstate")
    ADAPTER = ("adapter", "adapters", "adapters")
    GRADIENT = ("gradient", "gradients", "gradients")
    OPTIMIZER_STATE = ("optimizer_state", "optimizer state", "optimizer\nstate")
    ACTIVATION = ("activation", "activations", "activa-\ntions")
    TEMPORARY = ("temporary", "temporaries", "tempo-\nraries")
    OTHER = ("other", "other", "other")


Key = tuple[Category, str | None]


def _checked(key: object, size: object) -> tuple[Key, int]:
    if not (isinstance(key, tuple) and len(key) == 2 and (key[1] is None or isinstance(key[1], str))):
        raise ConfigError(f"the keys of a breakdown are (category, module name or None); got {key!r}")
    if isinstance(size, bool) or not isinstance(size, int):
        raise ConfigError(f"bytes must be an int; got {size!r} for {key!r}")
    try:
        return (Category(key[0]), key[1]), size
    except ValueError as error:
        known = ", ".join(category.value for category in Category)
        raise ConfigError(f"a category must be one of {known}; got {key[0]!r}") from error


class MemoryBreakdown(Mapping[Key, int]):
    """An immutable mapping (category, module name or None) -> bytes; entries of 0 bytes are dropped.

    The difference of two breakdowns may have negative entries. Raises ConfigError for other keys, or sizes that are
    not ints.
    """

    __slots__ = ("_bytes",)

    def __init__(self, sizes: Mapping[Key, int] | None = None) -> None:
        checked = dict(_checked(key, size) for key, size in (sizes or {}).items())
        self._bytes = {key: size for key, size in checked.items() if size}

    def __getitem__(self, key: Key) -> int:
        return self._bytes[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._bytes)

    def __len__(self) -> int:
        return len(self._bytes)

    def __hash__(self) -> int:
        return hash(frozenset(self._bytes.items()))

    def __repr__(self) -> str:
        return f"MemoryBreakdown({self._bytes!r})"

    def add(self, other: MemoryBreakdown) -> MemoryBreakdown:
        """Returns self + other, entry by entry."""
        return self._combined(other, 1)

    def diff(self, other: MemoryBreakdown) -> MemoryBreakdown:
        """Returns self - other, entry by entry."""
        return self._combined(other, -1)

    def __add__(self, other: MemoryBreakdown) -> MemoryBreakdown:
        return self.add(other) if isinstance(other, MemoryBreakdown) else NotImplemented

    def __sub__(self, other: MemoryBreakdown) -> MemoryBreakdown:
        return self.diff(other) if isinstance(other, MemoryBreakdown) else NotImplemented

    def total(self) -> int:
        """Returns the sum of all entries, in bytes."""
        return sum(self._bytes.values())

    def by_category(self) -> dict[Category, int]:
        """Returns the bytes of every category in the order of `Category`, 0 for those without an entry."""
        sums = dict.fromkeys(Category, 0)
        for (category, _), size in self._bytes.items():
            sums[category] += size
        return sums

    def by_module(self) -> dict[str | None, int]:
        """Returns the bytes of every module with an entry, the largest first; None holds bytes of no module."""
        sums: dict[str | None, int] = {}
        for (_, module), size in self._bytes.items():
            sums[module] = sums.get(module, 0) + size
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def to_json(self) -> list[dict[str, str | int | None]]:
        """Returns a list of `{"category", "module", "bytes"}` for `json.dumps`, sorted by category and module."""
        order = list(Category)
        keys = sorted(self._bytes, key=lambda key: (order.index(key[0]), key[1] or ""))
        return [{"category": key[0].value, "module": key[1], "bytes": self._bytes[key]} for key in keys]

    @classmethod
    def from_json(cls, rows: Sequence[Mapping[str, object]]) -> MemoryBreakdown:
        """Returns the breakdown that `to_json` wrote as these rows. Raises ConfigError for other rows."""
        for row in rows:
            if set(row) != {"category", "module", "bytes"}:
                raise ConfigError(f"a row of a breakdown must have the keys category, module and bytes; got {row!r}")
        sizes = dict(_checked((row["category"], row["module"]), row["bytes"]) for row in rows)
        if len(sizes) != len(rows):
            raise ConfigError(
                f"a breakdown must have one row for each category and module; got {len(rows) - len(sizes)} twice"
            )
        return cls(sizes)

    def _combined(self, other: MemoryBreakdown, sign: int) -> MemoryBreakdown:
        sizes = dict(self._bytes)
        for key, size in other._bytes.items():
            sizes[key] = sizes.get(key, 0) + sign * size
        return MemoryBreakdown(sizes)
