"""docs/families.md: written from the results of families.py, and read again by its test.

A family is in the list of those that are equal in every step without a setting, or has a row in the table. A cell of
the table is `yes`, `no` with the number of the reason, or empty if the step was not tried.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from textwrap import fill

from family_checks import CHECKS, DIFFERENT, EQUAL, FAILED, NOT_BUILT, REFUSED, Result

# The columns of the table, and the checks that each stands for.
STEPS = {
    "load": ("plain", "half"),
    "pack": ("packed",),
    "train": ("trained",),
    "adapter": ("adapter",),
    "export": ("export", "disk"),
    "packed folder": ("folder",),
    "packed rows": ("rows",),
    "peft": ("peft",),
}
YES, NO = "yes", "no"
INTRODUCTION = """\
# Model families

Every family that transformers {transformers} maps to a causal language model, and further shapes of some:
`name+shape` has other settings, and `name@whole` is the whole multimodal model that a language model is part of.
A small model of each was built with random weights and compared with plain transformers, in fp32 on a CPU.
`python tests/interop/families.py --markdown docs/families.md` does that, and wrote this page.

| step | what is equal |
|---|---|
| load | unpacked in fp32 and bf16: each tensor in dtype and bits, and the logits |
| pack | packed as NF4, it runs, and all of its linear layers get adapters |
| train | loss and gradients of a step: those of cross-entropy and autograd, with blocks recomputed and without |
| adapter | saved and loaded into a fresh model: the logits |
| export | merged in memory and on disk: the same files; in transformers and here, the logits of the adapted model |
| packed folder | written by `save_quantized` and loaded again: the logits |
| packed rows | two examples in a row: the loss of both by themselves |
| peft | peft {peft} loads the adapter: the logits |

Real checkpoints were not tried here, nor pictures, sounds, and inputs of an encoder.
"""


def is_whole(checks: Iterable[Result]) -> bool:
    """Whether every check of a family is equal, and no setting was needed."""
    found = {result.check: result for result in checks}
    return found.keys() >= set(CHECKS) and all(r.status == EQUAL and not r.note for r in found.values())


def grouped(found: Iterable[Result]) -> dict[str, dict[str, Result]]:
    """Returns the results by family and check."""
    families: dict[str, dict[str, Result]] = defaultdict(dict)
    for result in found:
        families[result.family][result.check] = result
    return families


def general(sentence: str) -> str:
    """Returns a refusal without what differs from family to family: numbers, names of classes, tensors and settings."""
    text = re.sub(r"\[[^]]*\]|\([^()]*\)", "", sentence)
    text = re.sub(r"\b\w+(\.\w+)+\b|\b\w*[A-Z]\w*[A-Z]\w*\b|\b\w*_\w*\b|(?<=of type )\w+", "...", text)
    return re.sub(r"[\d.,%]+|\ban?\b|, and \S+ more", "", text)


class Reasons:
    """Numbers the sentences of refusals; those that differ in numbers and names only have one number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self.sentences: list[str] = []

    def number(self, sentence: str) -> int:
        key = general(sentence)
        if key not in self._numbers:
            self.sentences.append(sentence)
            self._numbers[key] = len(self.sentences)
        return self._numbers[key]


def cells(checks: dict[str, Result], reasons: Reasons) -> list[str]:
    """Returns the cells of a family's row, without its name."""
    row = []
    for names in STEPS.values():
        ended = [checks[name] for name in names if name in checks]
        bad = next((result for result in ended if result.status != EQUAL), None)
        if bad is None:
            row.append(YES if ended else "")
        else:
            row.append(f"{NO} ({reasons.number(bad.why)})" if bad.status == REFUSED else bad.status)
    notes = [(step, checks[name].note) for step, names in STEPS.items() for name in names if name in checks]
    return [*row, "; ".join(f"{step}: `{note}`" for step, note in notes if note)]


def _paragraph(names: Iterable[str]) -> str:
    return fill(", ".join(f"`{name}`" for name in names), 120, break_long_words=False, break_on_hyphens=False)


def _numbered(reasons: Reasons) -> Iterator[str]:
    for number, sentence in enumerate(reasons.sentences, 1):
        safe, start = sentence.replace("<", "&lt;").replace("*", r"\*"), f"{number}. "
        yield fill(
            start + safe, 120, subsequent_indent=" " * len(start), break_long_words=False, break_on_hyphens=False
        )


def page(found: Iterable[Result], main_line: Iterable[str]) -> str:
    """Returns the page. main_line: the checks that a family has to pass to count as equal."""
    families, reasons, main_line = grouped(found), Reasons(), list(main_line)
    built = {family: checks for family, checks in families.items() if "built" not in checks}
    equal = sum(all(n in checks and checks[n].status == EQUAL for n in main_line) for checks in built.values())
    rows = [
        f"| `{family}` | {' | '.join(cells(checks, reasons))} |"
        for family, checks in built.items()
        if not is_whole(checks.values())
    ]
    wrong = sum(result.status in (DIFFERENT, FAILED) for checks in built.values() for result in checks.values())
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "peft")}
    parts = [
        INTRODUCTION.format(**versions),
        f"Of {len(built)} families and shapes, {equal} load, pack, train, and export with equal results. The others\n"
        f"are refused with a reason; {wrong or 'none'} computed something else, or stopped with another error.\n",
        "## Equal in every step\n",
        _paragraph(family for family, checks in built.items() if is_whole(checks.values())) + "\n",
        "## With a setting, or not in every step\n",
        "The last column has the settings that errors of these steps asked for, and that were made then. The numbers\n"
        "are those of the reasons below.\n",
        "\n".join([f"| family | {' | '.join(STEPS)} | settings |", "|---" * (len(STEPS) + 2) + "|", *rows]) + "\n",
        "## Reasons\n",
        "Each as it is for the first family that has it; names and numbers differ.\n",
        "\n".join(_numbered(reasons)) + "\n",
        "## Not tried\n",
        "What transformers itself does not build, or does not load again:\n",
        "\n".join(
            f"- `{family}`: {checks['built'].why}"
            for family, checks in families.items()
            if checks.get("built") and checks["built"].status == NOT_BUILT
        )
        + "\n",
    ]
    return "\n".join(parts)


def rows_of(text: str) -> dict[str, list[str]]:
    """Returns the cells of each family on the page, the numbers of reasons left out."""
    whole = text.partition("## Equal in every step\n")[2].partition("\n## ")[0]
    found = {name: [YES] * len(STEPS) + [""] for name in re.findall(r"`([^`]+)`", whole)}
    for line in text.partition("## With a setting")[2].partition("\n## ")[0].splitlines():
        if line.startswith("| `"):
            name, *row = (cell.strip() for cell in line.strip("|").split(" | "))
            found[name.strip("`| ")] = [re.sub(r" \(\d+\)", "", cell) for cell in row]
    return found


def not_tried(text: str) -> set[str]:
    """Returns the families of the page that transformers itself does not build."""
    return set(re.findall(r"^- `([^`]+)`: ", text.partition("## Not tried\n")[2], re.MULTILINE))
