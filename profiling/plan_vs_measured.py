"""Does a rehearsal tell the memory that training really takes?

    python profiling/plan_vs_measured.py                     # everything; some 15 minutes on two cores
    python profiling/plan_vs_measured.py ours peft           # parts: ours, peft, published, others
    python profiling/plan_vs_measured.py --tiny

ours: `rehearse_steps` beside `profile_steps`, real runs on this CPU, of six architectures and SmolLM2-135M in several
    set-ups (training_cases.py). peft: the same for plain transformers + peft + bitsandbytes (peft_steps.py).
published: exact bytes of other people's GPUs (published_runs.py). others: published rows whose set-up is not quite
    known, with what is not.

The error of a case is the largest of its phases': |rehearsed - measured| / measured peak of live tensor bytes. A
category is compared at those peaks: with itself where it has 1 % of the measured peak or more, else with that peak.
Prints a table a part and ends with one JSON line: `cases`, `mean_error`, `worst_error`, `worst_category_error`,
`peft_worst_error`, `peft_worst_other`, `resident_worst_error`, `published_mean_error`, `published_worst_error`,
`published_worst_under`, `published_held_aside_worst_error`, `verdicts_right`, and `today_*` for the peaks of published
runs with the loss of the transformers that is installed; None for a part that was not run. All but bytes are shares.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from parts.comparisons import compare_others, compare_ours, compare_peft, compare_published

PARTS = {"ours": compare_ours, "peft": compare_peft, "published": compare_published, "others": compare_others}
FIGURES = (
    "cases",
    "mean_error",
    "worst_error",
    "worst_category_error",
    "peft_worst_error",
    "peft_worst_category_error",
    "peft_worst_other",
    "resident_worst_error",
    "published_mean_error",
    "published_worst_error",
    "published_worst_under",
    "published_held_aside_worst_error",
    "today_mean_error",
    "today_worst_error",
    "verdicts_right",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"which of {', '.join(PARTS)}; all without")
    parser.add_argument("--tiny", action="store_true", help="a case or two of each part, of few layers: it works")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
    figures: dict[str, Any] = dict.fromkeys(FIGURES)
    with tempfile.TemporaryDirectory() as scratch:
        for part in given.parts:
            figures.update(PARTS[part](Path(scratch), given.tiny))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
