"""Does a rehearsal predict the memory that training takes?

    python profiling/plan_vs_measured.py                     # everything: some 15 minutes on two cores
    python profiling/plan_vs_measured.py ours peft           # some parts: ours, peft, published, others
    python profiling/plan_vs_measured.py --tiny

ours: `rehearse_steps` against `profile_steps`, real runs on this CPU, for six architectures and SmolLM2-135M in several
    set-ups (parts/training_cases.py).
peft: the same for plain transformers + peft + bitsandbytes (parts/peft_steps.py).
published: exact bytes that others measured on GPUs (parts/published_runs.py).
others: published rows whose set-up is known only in part, with the unknown parts.

The error of a case is the largest error of its phases: |rehearsed - measured| / measured peak of live tensor bytes.
Categories are compared at those peaks. The error of a category is relative to its measured bytes, or to the measured
peak where it has less than 1 % of that peak.

Prints a table for each part and ends with one JSON line: `cases`, `mean_error`, `worst_error`, `worst_category_error`,
`peft_worst_error`, `peft_worst_other`, `resident_worst_error`, `published_mean_error`, `published_worst_error`,
`published_worst_under`, `published_held_aside_worst_error`, `verdicts_right`, and `today_*` for the published runs
with the loss of the installed transformers. Figures of parts that did not run are null. All figures but bytes are
shares.
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
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}; all without a name")
    parser.add_argument("--tiny", action="store_true", help="a case or two of each part, with few layers")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    figures: dict[str, Any] = dict.fromkeys(FIGURES)
    with tempfile.TemporaryDirectory() as scratch:
        for part in given.parts:
            figures.update(PARTS[part](Path(scratch), given.tiny))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
