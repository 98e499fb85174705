"""The noun that prediction and observation share: bytes per category and module. Plain arithmetic, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

from qlora_lite.errors import ConfigError


class Category(str, Enum):
    """What bytes are for.

    BASE_WEIGHT: frozen weights and buffers, packed or not. QUANT_STATE: what unpacking them needs besides.
    ADAPTER: what is trained. GRADIENT: of what is trained. OPTIMIZER_STATE: moments and step counts.
    ACTIVATION: waits for the backward pass. TEMPORARY: lives shorter than that. OTHER: not seen being made.
    """

    BASE_WEIGHT = "base_weight"
    QUANT_STATE = "quant_state"
    ADAPTER = "adapter"
    GRADIENT = "gradient"
    OPTIMIZER_STATE = "optimizer_state"
    ACTIVATION = "activation"
    TEMPORARY = "temporary"
    OTHER = "other"


Key = tuple[Category, str | None]


def _checked(key: object, size: object) -> Key:
    if not (isinstance(key, tuple) and len(key) == 2 and (key[1] is None or isinstance(key[1], str))):
        raise ConfigError(f"a breakdown is keyed by (category, module name or None); got {key!r}")
    if isinstance(size, bool) or not isinstance(size, int):
        raise ConfigError(f"bytes must be an int; got {size!r} for {key!r}")
    try:
        return Category(key[0]), key[1]
    except ValueError as error:
        known = ", ".join(category.value for category in Category)
        raise ConfigError(f"a category must be one of {known}; got {key[0]!r}") from error


class MemoryBreakdown(Mapping[Key, int]):
    """An immutable mapping (category, module name or None) -> bytes; entries of 0 bytes are dropped.

    A difference may hold negative entries. Raises ConfigError for keys or sizes of another kind.
    """

    __slots__ = ("_bytes",)

    def __init__(self, sizes: Mapping[Key, int] | None = None) -> None:
        checked = {_checked(key, size): size for key, size in (sizes or {}).items()}
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
        """Entry by entry, self + other."""
        return self._combined(other, 1)

    def diff(self, other: MemoryBreakdown) -> MemoryBreakdown:
        """Entry by entry, self - other."""
        return self._combined(other, -1)

    def __add__(self, other: MemoryBreakdown) -> MemoryBreakdown:
        return self.add(other) if isinstance(other, MemoryBreakdown) else NotImplemented

    def __sub__(self, other: MemoryBreakdown) -> MemoryBreakdown:
        return self.diff(other) if isinstance(other, MemoryBreakdown) else NotImplemented

    def total(self) -> int:
        """The sum of all entries, in bytes."""
        return sum(self._bytes.values())

    def by_category(self) -> dict[Category, int]:
        """Bytes of every category, those without an entry as 0, in the order of `Category`."""
        sums = dict.fromkeys(Category, 0)
        for (category, _), size in self._bytes.items():
            sums[category] += size
        return sums

    def by_module(self) -> dict[str | None, int]:
        """Bytes of every module that has an entry, the largest first; None stands for what belongs to no module."""
        sums: dict[str | None, int] = {}
        for (_, module), size in self._bytes.items():
            sums[module] = sums.get(module, 0) + size
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def to_json(self) -> list[dict[str, Any]]:
        """A list of `{"category", "module", "bytes"}` for `json.dumps`, sorted by category and module."""
        order = list(Category)
        keys = sorted(self._bytes, key=lambda key: (order.index(key[0]), key[1] or ""))
        return [{"category": key[0].value, "module": key[1], "bytes": self._bytes[key]} for key in keys]

    @classmethod
    def from_json(cls, rows: list[dict[str, Any]]) -> MemoryBreakdown:
        """The inverse of `to_json`. Raises ConfigError for rows that it did not write."""
        for row in rows:
            if set(row) != {"category", "module", "bytes"}:
                raise ConfigError(f"a row of a breakdown has category, module and bytes; got {row!r}")
        sizes = {(row["category"], row["module"]): row["bytes"] for row in rows}
        if len(sizes) != len(rows):
            raise ConfigError(
                f"a breakdown has one row for each category and module; got {len(rows) - len(sizes)} twice"
            )
        return cls(sizes)

    def _combined(self, other: MemoryBreakdown, sign: int) -> MemoryBreakdown:
        sizes = dict(self._bytes)
        for key, size in other._bytes.items():
            sizes[key] = sizes.get(key, 0) + sign * size
        return MemoryBreakdown(sizes)
