"""Figures of an export for each weight: the error of packing, the size of the update, the error of rounding.

plan.py measures them while it computes the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypedDict

import numpy
import torch
from torch import Tensor

REPORT_FILE = "merge_report.json"
MOST_SHOWN = 5
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _squares(tensor: Tensor) -> float:
    """Returns the sum of squares, in fp32 along a row and in fp64 over the rows: independent of slices and threads."""
    rows = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
    return float(torch.linalg.vector_norm(rows, dim=1).double().square().sum())


def _different(one: Tensor, other: Tensor) -> int:
    """Returns how many values differ.

    Counts by bits and with numpy, because torch compares and counts ten times slower. The bits of two zeros may differ
    in the sign, like those of x and -x.
    """
    dtype = INTEGERS[one.element_size()]
    bits = (one.view(dtype) - other.view(dtype)).cpu().numpy().reshape(-1)
    opposite = torch.from_numpy(numpy.flatnonzero(bits == torch.iinfo(dtype).min)).to(one.device)
    return int(numpy.count_nonzero(bits)) - int((one.reshape(-1)[opposite] == 0).sum())


@dataclass
class TensorFigures:
    """Sums of squares over the values of one exported tensor; None if there is nothing to measure.

    weight: W0, the base that the update is added to. quantization: W0 as it was packed minus the checkpoint's, None
    without a checkpoint. update: what the adapter adds to W0, None without an adapter. rounding: the written minus the
    computed values. moved: the number of values that the update changed after the cast.
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
        """Adds the error of packing; overwrites `original`."""
        self.quantization = (self.quantization or 0.0) + _squares(original.sub_(packed))

    def add_update(self, update: Tensor) -> None:
        self.update = (self.update or 0.0) + _squares(update)

    def add_written(self, computed: Tensor, written: Tensor, without_update: Tensor | None) -> None:
        """Adds the error of rounding and the number of moved values; overwrites `computed`."""
        if without_update is not None:
            self.moved = (self.moved or 0) + _different(written, without_update)
        if written is not computed:  # the same object if nothing was cast
            self.rounding += _squares(computed.sub_(written.to(computed.dtype)))


class ReportRow(TypedDict):
    """The figures of one tensor in `merge_report.json`.

    update_over_quantization: update_norm / quantization_error_norm. unmoved_share: the share of values that the update
    left unchanged after the cast. None: as in `TensorFigures`.
    """

    name: str
    weight_norm: float | None
    quantization_error_norm: float | None
    update_norm: float | None
    update_over_quantization: float | None
    rounding_error_norm: float | None
    unmoved_share: float | None


@dataclass(frozen=True)
class MergeReport:
    """The figures of all exported floating tensors. base: the one that the updates were added to."""

    base: str
    dtype: str
    tensors: tuple[TensorFigures, ...]

    def total(self) -> TensorFigures:
        """Returns the sums over all tensors that have the figure."""

        def added(values: Iterable[float | None]) -> float | None:
            known = [value for value in values if value is not None]
            return sum(known) if known else None

        moved = added(figures.moved for figures in self.tensors)
        return TensorFigures(
            "all tensors",
            sum(figures.values for figures in self.tensors),
            sum(figures.weight for figures in self.tensors),
            added(figures.quantization for figures in self.tensors),
            added(figures.update for figures in self.tensors),
            sum(figures.rounding for figures in self.tensors),
            None if moved is None else int(moved),
        )

    def adapted_values(self) -> int:
        """Returns the number of values of the tensors that have an update."""
        return sum(figures.values for figures in self.tensors if figures.update is not None)

    def total_json(self) -> dict[str, object]:
        """Returns the entry `total` of `merge_report.json`."""
        total = row(self.total(), self.adapted_values())
        return {key: value for key, value in total.items() if key != "name"}

    def to_json(self) -> dict[str, object]:
        """Returns the contents of `merge_report.json`."""
        return {
            "base": self.base,
            "dtype": self.dtype,
            "total": self.total_json(),
            "tensors": [row(figures, figures.values) for figures in self.tensors],
        }


def _root(square: float | None) -> float | None:
    return None if square is None else math.sqrt(square)


def row(figures: TensorFigures, adapted_values: int) -> ReportRow:
    """Returns the figures of one tensor as they are in the report."""
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
    """Returns a table: all tensors together, then those with the smallest update relative to the error of packing."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"merged into the {report.base} base, written as {report.dtype}", title_justify="left")
    table.add_column("tensor", overflow="fold")
    for name in ("‖W‖", "‖packing error‖", "‖update‖", "update / error", "‖rounding‖", "unmoved"):
        table.add_column(name, justify="right")

    def shown(value: float | None, form: str = ".4g") -> str:
        return "–" if value is None else format(value, form)

    rows = [row(figures, figures.values) for figures in report.tensors]
    ratios = {number: figures["update_over_quantization"] for number, figures in enumerate(rows)}
    weakest = sorted((ratio, number) for number, ratio in ratios.items() if ratio is not None)[:MOST_SHOWN]
    for figures in (row(report.total(), report.adapted_values()), *(rows[number] for _, number in weakest)):
        table.add_row(
            figures["name"],
            shown(figures["weight_norm"]),
            shown(figures["quantization_error_norm"]),
            shown(figures["update_norm"]),
            shown(figures["update_over_quantization"]),
            shown(figures["rounding_error_norm"]),
            shown(figures["unmoved_share"], ".2%"),
        )
    console = Console(width=120, record=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
