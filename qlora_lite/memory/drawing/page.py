"""Writes a report as one self-contained HTML page: no scripts, no network, light and dark, wide and narrow.

Unknown sizes are shown as unknown. Every size is a `<data value="bytes">` with a readable size inside, and every text
of a report is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path

from qlora_lite.checkpoints.files import new_file
from qlora_lite.memory.breakdown import Category, MemoryBreakdown
from qlora_lite.memory.drawing.frame import colour_variables, document, figure_html, style_sheet
from qlora_lite.memory.drawing.palette import DARK, LIGHT, text_colour_on
from qlora_lite.memory.drawing.svg import share_bar, timeline_picture, treemap_picture
from qlora_lite.memory.drawing.tables import comparison_table, module_table, path_html, phase_table, size_html
from qlora_lite.memory.report import (
    ALLOCATED,
    RESERVED,
    RESIDENT,
    TENSORS,
    Column,
    MemoryReport,
    difference,
    has_values,
    readable_bytes,
    unit_for,
)

TITLE = "Memory of a training run"
# (class, width, height): pictures are drawn for a screen and for a phone, and base.css shows one of them.
SHAPES = (("wide", 1080, 340), ("narrow", 360, 300))
COUNTERS = (ALLOCATED, RESERVED, RESIDENT, TENSORS)
TREEMAP_HEIGHTS = {"wide": 520, "narrow": 460}


def write_page(
    path: str | Path,
    report: MemoryReport,
    predicted: MemoryReport | None = None,
    title: str = TITLE,
    overwrite: bool = False,
) -> None:
    """Writes the report as an HTML file, compared with the `predicted` report of the same work if one is given.

    Raises CheckpointError if the file exists and is not to be overwritten, or cannot be written.
    """
    with new_file(path, overwrite) as file:
        file.write(page(report, predicted, title).encode())


def page(report: MemoryReport, predicted: MemoryReport | None = None, title: str = TITLE) -> str:
    """Returns the text of the page that `write_page` writes."""
    sections = (
        _over_time(report, predicted),
        _by_module(report),
        () if predicted is None else _compared(predicted, report),
        _by_phase(report),
    )
    return document(title, _style(), (text for part in (_head(report, title), *sections, _foot()) for text in part))


def _style() -> str:
    light, dark = (
        "".join(f"--{key.value}:{colour};--on-{key.value}:{text_colour_on(colour)};" for key, colour in colours.items())
        for colours in (LIGHT, DARK)
    )
    fills = "".join(
        f".{key.value}{{fill:var(--{key.value});background:var(--{key.value})}}.on-{key.value}{{fill:var(--on-{key.value})}}\n"
        for key in Category
    )
    return colour_variables(light, dark) + fills + style_sheet(__package__, "page.css")


def _head(report: MemoryReport, title: str) -> Iterator[str]:
    badge, text = ("rehearsed", "rehearsed: predicted, not measured") if report.rehearsed else ("measured", "measured")
    yield f'<header><h1>{escape(title)}</h1><span class="badge {badge}">{text}</span></header>'
    phase = report.peak_phase()
    if phase is None or phase.live_peak is None:
        yield from _counter_headline(report)
    else:
        place = f" of <b>{path_html(phase.peak_in)}</b>" if phase.peak_in else ""
        verb = "would be" if report.rehearsed else "were"
        yield f'<p class="headline"><strong>{size_html(phase.live_peak)}</strong>'
        yield f"<span>of tensors {verb} alive at the peak, in <b>{escape(phase.name)}</b>{place}</span></p>"
        if phase.breakdown:
            yield from _parts(phase.breakdown)
    yield from _figures(report)


def _counter_headline(report: MemoryReport) -> Iterator[str]:
    """Yields the largest counter, for a report without traced storages."""
    column = next((column for column in (RESERVED, ALLOCATED, RESIDENT) if has_values(column, report)), RESIDENT)
    highest = _highest(column, report)
    yield f'<p class="headline"><strong>{size_html(None if highest is None else highest[0])}</strong>'
    place = "" if highest is None else f", in <b>{escape(highest[1])}</b>"
    yield f"<span>{column.name}{place}; storages were not traced, so the split by category is unknown</span></p>"


def _parts(breakdown: MemoryBreakdown) -> Iterator[str]:
    sizes = breakdown.by_category()
    unit = unit_for(breakdown.total())
    yield share_bar(sizes, breakdown.total())
    yield '<ul class="parts" aria-label="At the peak, by category">'
    for key, size in sizes.items():
        if size:
            share = f"{100 * size / breakdown.total():.1f} %"
            # A size that would be shown as 0 in the common unit gets a unit of its own.
            text = size_html(size, unit if 20 * size >= unit[0] else None, is_named=True)
            yield (
                f'<li><i class="swatch {key.value}"></i><span>{key.label}</span>'
                f"<b>{text}</b><small>{share}</small></li>"
            )
    yield "</ul>"


def _figures(report: MemoryReport) -> Iterator[str]:
    """Yields the peaks of the counters over the run: those of the accelerator, or of the process."""
    allocated, reserved, resident, tensors = (
        highest and highest[0] for highest in (_highest(column, report) for column in COUNTERS)
    )
    yield '<dl class="figures">'
    if has_values(ALLOCATED, report) or report.context_bytes is not None:
        needed = None if reserved is None or report.context_bytes is None else reserved + report.context_bytes
        yield _figure("the device needs", needed, "reserved and context")
        yield from (_peak_figure(column, report) for column in (ALLOCATED, RESERVED))
        yield _figure("fragmentation", difference(reserved, allocated), "peak reserved − peak allocated")
        yield _figure("context", report.context_bytes, "of the device, outside its allocator")
    else:
        yield _peak_figure(RESIDENT, report)
        yield _figure("rest of the process", difference(resident, tensors), "peak resident − peak tensors")
    yield "</dl>"


def _figure(name: str, size: int | None, note: str) -> str:
    return figure_html(name, size_html(size), note)


def _peak_figure(column: Column, report: MemoryReport) -> str:
    highest = _highest(column, report)
    return _figure(column.name, *((None, "") if highest is None else (highest[0], f"in {highest[1]}")))


def _highest(column: Column, report: MemoryReport) -> tuple[int, str] | None:
    """Returns the largest size of a column and its phase: the first one, since an allocator keeps what it reserved."""
    sizes = ((column.size(phase), phase.name) for phase in report.phases)
    return max(((size, name) for size, name in sizes if size is not None), key=lambda item: item[0], default=None)


def _legend(used: Iterable[Category]) -> str:
    items = (f'<li><i class="swatch {key.value}"></i>{key.label}</li>' for key in used)
    return f'<ul class="legend" aria-hidden="true">{"".join(items)}</ul>'


def _origin(report: MemoryReport) -> str:
    return "predicted" if report.rehearsed else "measured"


def _over_time(report: MemoryReport, predicted: MemoryReport | None) -> Iterator[str]:
    yield "<section><h2>Over time</h2>"
    timelines = [(_origin(report), report.timeline)]
    timelines += [] if predicted is None else [("predicted", predicted.timeline)]
    shown = [(origin, timeline) for origin, timeline in timelines if timeline]
    if not shown:
        yield '<p class="note">No timeline: storages were not traced.</p></section>'
        return
    yield '<p class="note">Live tensor bytes after each change. The horizontal axis counts changes, not seconds.</p>'
    highest = max(max(timeline.totals()) for _, timeline in shown)
    for origin, timeline in shown:
        peak = readable_bytes(max(timeline.totals()))
        title = f"Live tensor bytes over the run, {origin}, stacked by category; peak {peak}"
        yield f"<figure><figcaption>{origin}</figcaption>" if len(timelines) > 1 else "<figure>"
        for shape, width, height in SHAPES:
            picture = timeline_picture(timeline, highest, width, height, title, tips=shape == "wide")
            yield f'<div class="{shape}">{picture}</div>'
        yield "</figure>"
    missing = [origin for origin, timeline in timelines if not timeline]
    yield from (f'<p class="note">No timeline was {origin}.</p>' for origin in missing)
    yield (
        _legend(key for key in Category if any(any(timeline.sizes.get(key, ())) for _, timeline in shown))
        + "</section>"
    )


def _by_module(report: MemoryReport) -> Iterator[str]:
    phase = report.peak_phase()
    yield "<section><h2>By module at the peak</h2>"
    if phase is None or not phase.breakdown:
        yield '<p class="note">No split by module: storages were not traced.</p></section>'
        return
    breakdown = phase.breakdown
    total = readable_bytes(breakdown.total())
    name = escape(phase.name)
    text = f"Areas are proportional to bytes: {total} in all, in phase {name}. Repeated blocks are in rows."
    yield f'<p class="note">{text}</p>'
    for shape, width, _ in SHAPES:
        title = f"Bytes of modules at the peak of {phase.name}, as areas; the table below lists the largest"
        picture = treemap_picture(breakdown, width, TREEMAP_HEIGHTS[shape], title)
        yield f'<figure class="{shape}">{picture}</figure>'
    yield _legend(key for key, size in breakdown.by_category().items() if size)
    yield from module_table(breakdown)
    yield "</section>"


def _by_phase(report: MemoryReport) -> Iterator[str]:
    yield "<section><h2>By phase</h2>"
    yield from phase_table(report) if report.phases else ['<p class="note">No phase was entered.</p>']
    yield "</section>"


def _compared(predicted: MemoryReport, measured: MemoryReport) -> Iterator[str]:
    yield "<section><h2>Predicted and measured</h2>"
    yield from _pairs(predicted, measured)
    yield from comparison_table(predicted, measured)
    yield "</section>"


def _pairs(predicted: MemoryReport, measured: MemoryReport) -> Iterator[str]:
    """Yields two bars for each phase, on one scale: the tensors at its peak, predicted and measured."""
    reports = (("predicted", predicted), ("measured", measured))
    names = dict.fromkeys(phase.name for phase in (*measured.phases, *predicted.phases))
    pairs = {name: [(origin, report.phase(name)) for origin, report in reports] for name in names}
    known = [phase.breakdown.total() for pair in pairs.values() for _, phase in pair if phase and phase.breakdown]
    if not known:
        yield '<p class="note">Storages were traced in neither run.</p>'
        return
    yield '<p class="note">Tensors at the peak of each phase.</p><div class="pair">'
    for name, pair in pairs.items():
        yield f"<h3>{escape(name)}</h3>"
        for origin, phase in pair:
            breakdown = None if phase is None else phase.breakdown
            bar = "" if breakdown is None else share_bar(breakdown.by_category(), max(known))
            size = size_html(None if breakdown is None else breakdown.total())
            yield f'<div><span>{origin}</span>{bar}<span class="size">{size}</span></div>'
    yield "</div>"


def _foot() -> Iterator[str]:
    yield "<footer><p>1 MiB is 1,048,576 bytes. A phase that was entered several times shows the largest peak of any"
    yield "entry, and peaks of different counters may be at different moments. Temporaries are tensors that do not wait"
    yield "for the backward pass.</p></footer>"
