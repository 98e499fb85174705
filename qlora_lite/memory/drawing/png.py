"""Draws the timeline of a report as a PNG. No other file of the package imports matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qlora_lite.checkpoints.files import new_file
from qlora_lite.errors import ConfigError
from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.drawing.palette import LIGHT
from qlora_lite.memory.report import MemoryReport, Timeline, axis_ticks, readable_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT, DPI = 11.0, 4.2, 150  # inches, inches of each panel, dots per inch
TEXT, MUTED, GRID, ACCENT = "#1c1f26", "#5c6370", "#e2e2dc", "#a8321f"
NARROWEST_NAME = 0.035  # the smallest share of the width at which the name of a phase is shown


def require_matplotlib() -> None:
    """Raises ConfigError where matplotlib cannot be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "a PNG needs matplotlib, which is not installed; run: pip install 'qlora-lite[plot]'"
        ) from error


def write_chart(
    path: str | Path, report: MemoryReport, predicted: MemoryReport | None = None, overwrite: bool = False
) -> None:
    """Draws live tensor bytes over the run, stacked by category, with those of `predicted` below on the same scale.

    Raises ConfigError for a report without a timeline and where matplotlib is missing; CheckpointError if the file
    exists and is not to be overwritten, or cannot be written.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not report.timeline:
        raise ConfigError("a chart needs a timeline, and this report has none; measure with MemoryProfiler(trace=True)")
    panels = [("predicted" if report.rehearsed else "measured", report.timeline)]
    if predicted is not None and predicted.timeline:
        panels.append(("predicted", predicted.timeline))
    figure = Figure(figsize=(WIDTH, HEIGHT * len(panels)), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    FigureCanvasAgg(figure)
    highest = max(max(timeline.totals()) for _, timeline in panels)
    for axes, (origin, timeline) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        _draw(axes, origin, timeline, highest)
    used = [key for key in Category if any(any(timeline.sizes.get(key, ())) for _, timeline in panels)]
    _add_legend(figure, used)
    with new_file(path, overwrite) as file:
        figure.savefig(file, format="png")


def _draw(axes: Axes, origin: str, timeline: Timeline, highest: int) -> None:
    totals = timeline.totals()
    edges = range(len(timeline) + 1)
    lower = [0] * len(edges)
    for key, column in timeline.sizes.items():
        upper = [low + size for low, size in zip(lower, (*column, column[-1]), strict=True)]
        axes.fill_between(edges, lower, upper, step="post", color=LIGHT[key], linewidth=0)
        lower = upper
    peak = totals.index(max(totals))
    where = f" in {timeline.phases[peak]}" if timeline.phases[peak] else ""
    title = f"{origin}: peak {readable_bytes(totals[peak])} of tensors{where}"
    axes.set_title(title, loc="left", fontsize=11, color=TEXT, pad=10)
    axes.axvline(peak + 0.5, color=ACCENT, linewidth=1, linestyle=(0, (3, 3)))
    axes.plot([peak + 0.5], [totals[peak]], "o", color=ACCENT, markersize=5, clip_on=False)
    ticks = axis_ticks(highest)
    axes.set_yticks([size for size, _ in ticks], [label for _, label in ticks])
    axes.set(xlim=(0, len(timeline)), ylim=(0, max(1, highest) * 1.03), axisbelow=True)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.tick_params(length=0, labelsize=9, labelcolor=MUTED)
    axes.spines[:].set_visible(False)
    _mark_phases(axes, timeline)


def _mark_phases(axes: Axes, timeline: Timeline) -> None:
    spans = list(timeline.spans())
    for _, first, _ in spans[1:]:
        axes.axvline(first, color="white", linewidth=0.8, alpha=0.6)
    named = [span for span in spans if span[0] and span[2] - span[1] >= NARROWEST_NAME * len(timeline)]
    # Dollar signs in a name must not be read as a formula.
    names = [str(name).replace("$", r"\\$") for name, _, _ in named]
    axes.set_xticks([(first + after) / 2 for _, first, after in named], names)


def _add_legend(figure: Figure, used: list[Category]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=LIGHT[key], label=key.label) for key in used]
    figure.legend(
        handles=patches,
        loc="outside lower center",
        ncols=min(8, max(1, len(used))),
        frameon=False,
        fontsize=9,
        labelcolor=MUTED,
        handlelength=1,
        handleheight=1,
    )
