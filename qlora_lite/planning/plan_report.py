"""A `Plan` as text for people."""

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

NOTHING = "-"


def render_plan(plan: Plan, width: int = 100) -> str:
    """The plan as sentences and tables, `width` characters wide at most."""
    wanted = plan.wanted
    batch = f"{wanted.rows} x {wanted.tokens} tokens, checkpointing {_dial(wanted.checkpointing)}"
    if plan.forecast is None:
        return "\n".join([*_counted(plan, batch), ""])
    assert plan.needed is not None
    verdict = "fits into" if plan.fits else "does not fit into"
    lines = [f"{batch}: {verdict} {readable_bytes(plan.memory.size)}; needed: {readable_bytes(plan.needed)}", ""]
    rows = [
        [category.value.replace("_", " "), readable_bytes(plan.forecast.by_category[category])]
        for category in Category
        if plan.forecast.by_category[category]
    ]
    rows.append(["live tensors at the peak", readable_bytes(plan.forecast.peak)])
    lines += [_table(["at the peak", "bytes"], [*rows, *_beside(plan, plan.forecast)], width)]
    where = plan.forecast.module or "no module"
    lines += [f"The peak is in phase {plan.forecast.phase}, in {where}.", _least(plan), ""]
    lines += [_table(["tokens", "largest batch (rows)", "needed"], _largest(plan), width)]
    lines += [_table(["change", "peak of live tensors"], _gains(plan), width), *_how(plan, plan.forecast, width)]
    return "\n".join(line.rstrip() for line in "\n".join(lines).splitlines()) + "\n"


def _dial(checkpointing: str | int | None) -> str:
    return readable_bytes(checkpointing) if isinstance(checkpointing, int) else str(checkpointing)


def _beside(plan: Plan, forecast: Forecast) -> list[list[str]]:
    rows = []
    if forecast.reserved is not None:
        rows.append(["reserved by the allocator beyond them", readable_bytes(forecast.reserved - forecast.peak)])
    what = "context of the device" if plan.memory.accelerator else "rest of the process"
    return [*rows, [f"{what} ({plan.memory.beside_is})", readable_bytes(plan.memory.beside)]]


def _least(plan: Plan) -> str:
    least = plan.least
    if least is None or least.checkpointing is None or least.needed is None:
        return "Least recomputation that fits: none does, not even full."
    most = "at most " if isinstance(least.checkpointing, int) else ""
    return (
        f"Least recomputation that fits: checkpointing {_dial(least.checkpointing)}"
        f" (needs {most}{readable_bytes(least.needed)})."
    )


def _largest(plan: Plan) -> list[list[str]]:
    return [
        [
            str(entry.tokens),
            f"{entry.rows}{' or more' if entry.more else ''}",
            NOTHING if entry.needed is None else readable_bytes(entry.needed),
        ]
        for entry in plan.largest
    ]


def _gains(plan: Plan) -> list[list[str]]:
    rows = []
    for gain in plan.gains:
        if gain.difference is None:
            rows.append([gain.change, f"not possible: {gain.why_not}"])
        else:
            sign = "-" if gain.difference < 0 else "+"
            rows.append([gain.change, f"{sign}{readable_bytes(abs(gain.difference))}"])
    return rows


def _how(plan: Plan, forecast: Forecast, width: int) -> list[str]:
    counts = " and ".join(map(str, forecast.layers))
    if plan.whole or len(forecast.layers) < 2:
        how = f"Rehearsed with all layers of the model{f' ({counts})' if counts else ''}."
    else:
        how = (
            f"Rehearsed with {counts} layers and continued to all of them by straight lines; "
            f"compared with a rehearsal of {forecast.layers[-1] + 1} layers: equal to the byte."
        )
    if plan.memory.accelerator:
        how += " What the allocator reserves is an estimate."
    if plan.memory.beside_is == "assumed":
        how += " The context of the device cannot be known without it: --overhead sets another size."
    return textwrap.wrap(how, width)


def _counted(plan: Plan, batch: str) -> list[str]:
    assert plan.counted is not None
    total = sum(plan.counted.values()) + plan.memory.beside
    lines = [f"not rehearsed: {plan.not_rehearsed}"]
    lines += [f"{name.replace('_', ' ')}: {readable_bytes(size)}" for name, size in plan.counted.items()]
    lines += ["activations and temporaries: not rehearsed"]
    if plan.fits is None:
        lines.append(f"{batch}: at least {readable_bytes(total)} needed; whether it fits is not known")
    else:
        lines.append(f"{batch}: does not fit into {readable_bytes(plan.memory.size)}; {readable_bytes(total)} at least")
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
