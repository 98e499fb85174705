"""What an export did to each weight, in numbers: what packing had cost, how large the update is, what the cast cost."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST_SHOWN = 5
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _squares(tensor: Tensor) -> float:
    """Summed in fp32 along a row and in fp64 over the rows, so that neither slices nor threads show in the figures."""
    rows = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
    return float(torch.linalg.vector_norm(rows, dim=1).double().square().sum())


def _different(one: Tensor, other: Tensor) -> int:
    """How many values are not equal; of bits less the sign, since torch compares floats ten times as slowly."""
    bits = (one - other).view(INTEGERS[one.element_size()])
    return int(torch.count_nonzero(bits.bitwise_left_shift_(1)))


@dataclass
class TensorFigures:
    """Sums over the values of one exported tensor; norms are their roots. None: not measured, or nothing to measure.

    weight: W0, the base that was written into. quantization: W0 as it was packed, less the checkpoint's; None without
    a checkpoint. update: what the adapter adds to W0, None without an adapter. rounding: what was written
    less what was computed. moved: values that the update changed after the cast.
    """

    name: str
    values: int
    weight: float = 0.0
    quantization: float | None = None
    update: float | None = None
    rounding: float = 0.0
    moved: int | None = None

    def add_weight(self, base: Tensor) -> None:
        self.weight += _squares(base)

    def add_quantization(self, packed: Tensor, original: Tensor) -> None:
        """Leaves `original` changed."""
        self.quantization = (self.quantization or 0.0) + _squares(original.sub_(packed))

    def add_update(self, update: Tensor) -> None:
        self.update = (self.update or 0.0) + _squares(update)

    def add_written(self, computed: Tensor, written: Tensor, without_update: Tensor | None) -> None:
        """Leaves `computed` changed."""
        if without_update is not None:
            self.moved = (self.moved or 0) + _different(written, without_update)
        if written is not computed:  # as it is where nothing was cast
            self.rounding += _squares(computed.sub_(written.to(computed.dtype)))


@dataclass(frozen=True)
class MergeReport:
    """The figures of all exported floating tensors, and which base was written into."""

    base: str
    dtype: str
    tensors: tuple[TensorFigures, ...]

    def total(self) -> TensorFigures:
        """The sums over all tensors; for quantization and update over those that have one."""

        def added(values: Iterable[float | int | None]) -> Any:
            known = [value for value in values if value is not None]
            return sum(known) if known else None

        return TensorFigures(
            "all tensors",
            sum(figures.values for figures in self.tensors),
            sum(figures.weight for figures in self.tensors),
            added(figures.quantization for figures in self.tensors),
            added(figures.update for figures in self.tensors),
            sum(figures.rounding for figures in self.tensors),
            added(figures.moved for figures in self.tensors),
        )

    def adapted_values(self) -> int:
        return sum(figures.values for figures in self.tensors if figures.update is not None)

    def to_json(self) -> dict[str, Any]:
        total = row(self.total(), self.adapted_values())
        return {
            "base": self.base,
            "dtype": self.dtype,
            "total": {key: value for key, value in total.items() if key != "name"},
            "tensors": [row(figures, figures.values) for figures in self.tensors],
        }


def _root(square: float | None) -> float | None:
    return None if square is None else math.sqrt(square)


def row(figures: TensorFigures, adapted_values: int) -> dict[str, Any]:
    """Norms and shares of one tensor. `update_over_quantization`: how many times the error of packing the update is."""
    quantization, update = _root(figures.quantization), _root(figures.update)
    ratio = None if update is None or not quantization else update / quantization
    return {
        "name": figures.name,
        "weight_norm": _root(figures.weight),
        "quantization_error_norm": quantization,
        "update_norm": update,
        "update_over_quantization": ratio,
        "rounding_error_norm": _root(figures.rounding),
        "unmoved_share": None if figures.moved is None else 1 - figures.moved / adapted_values,
    }


def render(report: MergeReport) -> str:
    """A short table: all tensors together, and those whose update is smallest beside the error of packing."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"merged into the {report.base} base, written as {report.dtype}", title_justify="left")
    table.add_column("tensor", overflow="fold")
    for name in ("‖W‖", "‖packing error‖", "‖update‖", "update / error", "‖rounding‖", "unmoved"):
        table.add_column(name, justify="right")

    def shown(value: float | None, form: str = ".4g") -> str:
        return "–" if value is None else format(value, form)

    rows = [row(figures, figures.values) for figures in report.tensors]
    compared = [figures for figures in rows if figures["update_over_quantization"] is not None]
    weakest = sorted(compared, key=lambda figures: figures["update_over_quantization"])
    for figures in (row(report.total(), report.adapted_values()), *weakest[:MOST_SHOWN]):
        cells = (shown(figures[key]) for key in list(figures)[1:-1])
        table.add_row(figures["name"], *cells, shown(figures["unmoved_share"], ".2%"))
    console = Console(width=120, record=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
