"""`qlora-lite report`: draws what runs of `train` left in their folders as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_lite.cli.options import Json, finish
from qlora_lite.errors import ConfigError

REPORT_FILE = "report.html"


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of runs, --output of train. Several are compared on one page."),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", help=f"HTML file to write. Default: {REPORT_FILE} in the run's folder.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Keep the page up to date while a run goes on, until it ends or Ctrl-C.")
    ] = False,
    json: Json = False,
) -> None:
    """Draw runs as an HTML page: loss, held-out loss, memory, speed, settings, and what happened."""
    from qlora_lite.reports.history import read_history
    from qlora_lite.reports.page import write_report
    from qlora_lite.reports.watch import watch_report

    if output is None and len(runs) > 1:
        raise ConfigError(f"a page of {len(runs)} runs belongs into none of their folders; name it with --output")
    if len({run.resolve() for run in runs}) < len(runs):
        raise ConfigError("a run is named twice; name each once")
    page = output or runs[0] / REPORT_FILE
    if watch:
        histories = watch_report(page, runs)
    else:
        histories = [read_history(run) for run in runs]
        write_report(page, histories)
    if len(histories) == 1:
        finish({**histories[0].figures(), "page": str(page)}, json)
    elif json:
        finish({"runs": [history.figures() for history in histories], "page": str(page)}, json)
    else:
        for history in histories:
            finish(history.figures(), json)
            print()
        finish({"page": str(page)}, json)
