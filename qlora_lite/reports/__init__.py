"""What a run of `train` left in its folder, read and drawn.

In reading order:

history    RunHistory: the files of a run, read also where they are damaged or still written
series     values over steps: smoothed, thinned, and the ticks of their axes
curves     line charts as SVG
charts     which curves runs have, with their axes and marks
tables     what happened, settings, and the figures in tables
page       the HTML page of one run or several, with its style sheet report.css
watch      keeps a page up to date while a run goes on
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.reports.history import RunHistory as RunHistory
    from qlora_lite.reports.history import read_history as read_history
    from qlora_lite.reports.page import write_report as write_report

__getattr__, __dir__, __all__ = lazy_names(__name__, {"history": "RunHistory read_history", "page": "write_report"})
