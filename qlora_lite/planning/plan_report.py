"""Renders a `Plan` as text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.report import readable_bytes
from qlora_lite.planning.forecast import Forecast
from qlora_lite.planning.memory_plan import Plan
from qlora_lite.sharding.count import BaseInShares

NOTHING = "-"


def render_plan(plan: Plan, width: int = 100) -> str:
    """Returns the plan as sentences and tables, at most `width` characters wide."""
    setup = plan.setup
    batch = f"{setup.rows} x {setup.tokens} tokens, checkpointing {_checkpointing(setup.checkpointing)}"
    if plan.forecast is None:
        return "\n".join([*_counted_lines(plan, batch), ""])
    assert plan.needed is not None
    verdict = "fits into" if plan.fits else "does not fit into"
    lines = [f"{batch}: {verdict} {readable_bytes(plan.memory.size)}; needed: {readable_bytes(plan.needed)}", ""]
    rows = [
        [category.label, readable_bytes(plan.forecast.by_category[category])]
        for category in Category
        if plan.forecast.by_category[category]
    ]
    rows.append(["live tensors at the peak", readable_bytes(plan.forecast.peak)])
    lines += [_table(["at the peak", "bytes"], [*rows, *_overhead_rows(plan, plan.forecast)], width)]
    where = plan.forecast.module or "no module"
    lines += [f"The peak is in phase {plan.forecast.phase}, in {where}.", *_disk_lines(plan.forecast)]
    lines += [_least_line(plan), ""]
    lines += [_table(["tokens", "largest batch (rows)", "needed"], _largest_rows(plan), width)]
    lines += [
        _table(["change", "peak of live tensors"], _alternative_rows(plan), width),
        *_method_lines(plan, plan.forecast, width),
    ]
    return "\n".join(line.rstrip() for line in "\n".join(lines).splitlines()) + "\n"


def render_shares(shares: BaseInShares) -> str:
    """Returns in sentences what each process holds of a base in shares, and what goes over the wire."""
    held, whole, gathered = map(readable_bytes, (shares.share, shares.whole, shares.gathered))
    received = readable_bytes(shares.received)
    return (
        f"base in shares of {shares.processes} processes: each holds {held} of {whole}, gathers at most {gathered},\n"
        f"and receives {received} for each batch of a step. The plan is for one process and its rows.\n"
    )


def _checkpointing(checkpointing: str | int | None) -> str:
    return readable_bytes(checkpointing) if isinstance(checkpointing, int) else str(checkpointing)


def _overhead_rows(plan: Plan, forecast: Forecast) -> list[list[str]]:
    rows = []
    if forecast.reserved is not None:
        rows.append(["reserved by the allocator beyond these", readable_bytes(forecast.reserved - forecast.peak)])
    if plan.memory.in_shares:
        rows.append(["a base in shares takes less", f"-{readable_bytes(plan.memory.in_shares)}"])
    name = "context of the device" if plan.memory.accelerator else "rest of the process"
    return [*rows, [f"{name} ({plan.memory.overhead_source})", readable_bytes(plan.memory.overhead)]]


def _disk_lines(forecast: Forecast) -> list[str]:
    if not forecast.on_disk:
        return []
    sizes = (readable_bytes(size) for size in (forecast.on_disk, forecast.resident_base, forecast.read_a_batch))
    whole, resident, read = sizes
    return [f"On disk: {whole} of the base, of which at most {resident} are resident; a batch reads at most {read}."]


def _least_line(plan: Plan) -> str:
    least = plan.least
    if least is None or least.checkpointing is None or least.needed is None:
        return "Least recomputation that fits: none, not even checkpointing full."
    most = "at most " if isinstance(least.checkpointing, int) else ""
    return (
        f"Least recomputation that fits: checkpointing {_checkpointing(least.checkpointing)}"
        f" (needs {most}{readable_bytes(least.needed)})."
    )


def _largest_rows(plan: Plan) -> list[list[str]]:
    return [
        [
            str(entry.tokens),
            f"{entry.rows}{' or more' if entry.more else ''}",
            NOTHING if entry.needed is None else readable_bytes(entry.needed),
        ]
        for entry in plan.largest
    ]


def _alternative_rows(plan: Plan) -> list[list[str]]:
    rows = []
    for alternative in plan.alternatives:
        if alternative.difference is None:
            rows.append([alternative.change, f"not possible: {alternative.why_not}"])
        else:
            sign = "-" if alternative.difference < 0 else "+"
            rows.append([alternative.change, f"{sign}{readable_bytes(abs(alternative.difference))}"])
    return rows


def _method_lines(plan: Plan, forecast: Forecast, width: int) -> list[str]:
    counts = " and ".join(map(str, forecast.layers))
    if plan.rehearsed_whole or len(forecast.layers) < 2:
        method = f"Rehearsed with all layers of the model{f' ({counts})' if counts else ''}."
    else:
        method = (
            f"Rehearsed with {counts} layers and extrapolated linearly to all layers; "
            f"a rehearsal of {forecast.layers[-1] + 1} layers agrees to the byte."
        )
    if plan.memory.accelerator:
        method += " The reserved bytes are an estimate."
    if plan.memory.overhead_source == "assumed":
        method += " The context is unknown without the device; set its size with --overhead."
    return textwrap.wrap(method, width)


def _counted_lines(plan: Plan, batch: str) -> list[str]:
    assert plan.counted is not None
    total = readable_bytes(sum(plan.counted.values()) + plan.memory.overhead - plan.memory.in_shares)
    lines = [f"not rehearsed: {plan.not_rehearsed}"]
    lines += [f"{name.replace('_', ' ')}: {readable_bytes(size)}" for name, size in plan.counted.items()]
    lines += ["activations and temporaries: not rehearsed"]
    if plan.fits is None:
        lines.append(f"{batch}: at least {total} needed; whether it fits is unknown")
    else:
        lines.append(f"{batch}: does not fit into {readable_bytes(plan.memory.size)}; at least {total} needed")
    return lines


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(headings[0], overflow="fold")
    for heading in headings[1:]:
        table.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as captured:
        console.print(table)
    return str(captured.get())
