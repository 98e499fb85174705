"""The checks of matrix.py: adapters that each side makes, and a check for each direction.

A side that refuses raises: exceptions of peft, and errors of this library that the table of known refusals has,
become Refused. Any other exception in a check fails its case.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cases import Subject, known_refusal
from qlora_lite import QLoRAError, export_merged, load_adapter_, save_adapter
from trained_adapters import Workshop, disturb_, logits, our_trained, peft_loaded, peft_trained, saved_values

PASSED, BY_PEFT, BY_US, FAILED = "passed", "refused_by_peft", "refused_by_us", "failed"
RELOADED = "peft loads another model from its file than it trained; ours equals the loaded one"
FP32_LOGITS = 1e-5
MERGED_WEIGHTS = 1e-6
# The least change of the logits by an adapter. A case with a smaller change would prove nothing.
LEAST_EFFECT = 1e-3
BF16_MARGIN, BF16_STEP = 1.25, 2**-9


class Refused(Exception):
    """One side refuses; `by` names it."""

    def __init__(self, by: str, sentence: str) -> None:
        super().__init__(sentence)
        self.by = by


class Different(Exception):
    """Both sides accepted the case, and their results differ."""


@dataclass(frozen=True)
class Result:
    subject: Subject
    direction: str
    status: str
    why: str = ""


def first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def asked_of_peft(call: Callable[[], Any]) -> Any:
    """Calls peft. Raises Refused for any exception."""
    try:
        return call()
    except Exception as error:
        raise Refused(BY_PEFT, first_line(error)) from error


def asked_of_us(subject: Subject, call: Callable[[], Any]) -> Any:
    """Calls this library. Raises Refused for a known refusal; any other exception passes and fails the case."""
    try:
        return call()
    except QLoRAError as error:
        if known_refusal(subject, str(error)) is None:
            raise
        raise Refused(BY_US, first_line(error)) from error


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Returns the largest difference relative to the largest value; infinity for other shapes or values not finite."""
    if ours.shape != theirs.shape or not (ours.isfinite().all() and theirs.isfinite().all()):
        return float("inf")
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))


def check_equal(what: str, ours: Tensor, theirs: Tensor, bound: float) -> None:
    found = difference(ours, theirs)
    if not found <= bound:
        raise Different(f"{what} differ by {found:.1e} of the largest value, more than {bound:g}")


def error_of(found: Tensor, exact: Tensor) -> float:
    """Returns the relative error of the logits of the median token.

    The median, because a router that is nearly undecided sends single tokens to another expert.
    """
    return float(((found - exact).norm(dim=-1) / exact.norm(dim=-1)).median())


class Trial:
    """One subject: the adapters that each side trained and saved, made on first use."""

    def __init__(self, workshop: Workshop, subject: Subject, scratch: Path, disturb: str | None) -> None:
        self.workshop, self.subject, self.scratch, self.disturb = workshop, subject, scratch, disturb
        self._outcomes: dict[str, Any] = {}

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._outcomes:
            try:
                self._outcomes[name] = make()
            except Exception as error:
                self._outcomes[name] = error
        found = self._outcomes[name]
        if isinstance(found, Exception):
            raise found
        return found

    def by_peft(self) -> tuple[Tensor, Path, str]:
        """Returns logits and folder of peft's adapter, and a remark if peft loads another model than it trained."""

        def make() -> tuple[Tensor, Path, str]:
            folder = self.scratch / "by_peft"
            trained = asked_of_peft(lambda: peft_trained(self.workshop, self.subject, folder))
            found = asked_of_peft(lambda: logits(peft_loaded(self.workshop, self.subject, folder)))
            self._check_effect(found, self.workshop.theirs(self.subject.family, self.subject.base))
            return found, folder, "" if difference(found, trained) <= FP32_LOGITS else RELOADED

        return self._once("peft", make)

    def by_us(self) -> tuple[Tensor, Path]:
        """Returns logits and folder of our adapter."""

        def make() -> tuple[Tensor, Path]:
            if reason := self.subject.not_built():
                raise Refused(BY_US, reason)
            folder = self.scratch / "by_us"
            model, found = asked_of_us(self.subject, lambda: our_trained(self.workshop, self.subject))
            save_adapter(model, folder)
            self._check_effect(found, self.ours())
            return found, folder

        return self._once("us", make)

    def _check_effect(self, found: Tensor, base: Any) -> None:
        if not LEAST_EFFECT < difference(found, logits(base)) < float("inf"):
            raise Different("the adapter changes nothing, or makes logits infinite, so the case would prove nothing")

    def handed(self, folder: Path) -> Path:
        """Returns the folder that the other side loads: this one, or a disturbed copy of it if `disturb` is set."""
        if self.disturb is None:
            return folder
        copied = folder.with_name(f"{folder.name}_disturbed")
        if not copied.is_dir():
            shutil.copytree(folder, copied)
            disturb_(copied, self.disturb)
        return copied

    def ours(self, dtype: torch.dtype = torch.float32) -> Any:
        return self.workshop.ours(self.subject.family, self.subject.base, dtype)

    def loaded(self, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        """Loads the adapter of this folder into a fresh base."""
        model = self.ours(dtype)
        asked_of_us(self.subject, lambda: load_adapter_(model, folder))
        return model

    def loaded_by_peft(self, folder: Path) -> Any:
        """Loads our adapter with peft. Raises Refused only if peft cannot make such an adapter itself."""
        try:
            return peft_loaded(self.workshop, self.subject, folder)
        except Exception as error:
            try:
                self.by_peft()
            except Refused as refused:
                raise Refused(BY_PEFT, first_line(error)) from refused
            raise Different(f"peft does not load what we saved: {first_line(error)}") from error


def from_peft(trial: Trial) -> str:
    found, folder, remark = trial.by_peft()
    check_equal("logits", logits(trial.loaded(trial.handed(folder))), found, FP32_LOGITS)
    return remark


def to_peft(trial: Trial) -> str:
    found, folder = trial.by_us()
    check_equal("logits", logits(trial.loaded_by_peft(trial.handed(folder))), found, FP32_LOGITS)
    return ""


def bf16(trial: Trial) -> str:
    """Compares our error against fp32 with peft's; where its fp32 adapters are more exact, with its bf16 adapters."""
    found, folder, _ = trial.by_peft()
    mine = error_of(logits(trial.loaded(trial.handed(folder), torch.bfloat16)), found)
    why = f"bf16 error {mine:.1e} against peft's"
    for kept in (torch.float32, torch.bfloat16):
        theirs = peft_loaded(trial.workshop, trial.subject, folder, torch.bfloat16, kept)
        error = error_of(logits(theirs), found)
        if mine <= BF16_MARGIN * error + BF16_STEP:
            return (
                ""
                if kept == torch.float32
                else "in bf16 as exact as peft with bf16 adapters, less exact than with fp32"
            )
        why += f" {error:.1e} with {kept} adapters"
    raise Different(why)


def merge(trial: Trial) -> str:
    """Compares exported weights with peft's merged ones; logits alone where peft's merge differs from its own model."""
    import transformers

    found, folder, _ = trial.by_peft()
    model = trial.loaded(trial.handed(folder))
    asked_of_us(trial.subject, lambda: export_merged(model, trial.scratch / "merged", torch.float32))
    exported = transformers.AutoModelForCausalLM.from_pretrained(trial.scratch / "merged", dtype=torch.float32)
    check_equal("logits of the export", logits(exported), found, FP32_LOGITS)
    merged = asked_of_peft(peft_loaded(trial.workshop, trial.subject, folder).merge_and_unload)
    if difference(logits(merged), found) > FP32_LOGITS:
        return "peft's merge differs from its adapter model (tied weights); ours does not"
    theirs, ours = merged.state_dict(), exported.state_dict()
    if ours.keys() != theirs.keys():
        raise Different(f"names of merged weights differ: {', '.join(sorted(ours.keys() ^ theirs.keys())[:4])}")
    for name, weight in ours.items():
        check_equal(f"merged {name}", weight, theirs[name], MERGED_WEIGHTS)
    return ""


def check_same_files(ours: Path, other: Path) -> None:
    (tensors, config), (others, other_config) = saved_values(ours), saved_values(other)
    if config != other_config:
        keys = [key for key in config.keys() | other_config.keys() if config.get(key) != other_config.get(key)]
        raise Different(f"saved again, the configuration differs in {', '.join(sorted(keys))}")
    if tensors.keys() != others.keys() or any(not torch.equal(tensors[key], others[key]) for key in tensors):
        raise Different("saved again, the tensors differ")


def files(trial: Trial) -> str:
    found, folder = trial.by_us()
    again, by_peft, back = (trial.scratch / name for name in ("again", "saved_by_peft", "back"))
    save_adapter(trial.loaded(trial.handed(folder)), again)
    check_same_files(folder, again)
    trial.loaded_by_peft(folder).save_pretrained(by_peft)
    model = trial.loaded(by_peft)
    check_equal("logits after peft's save", logits(model), found, FP32_LOGITS)
    save_adapter(model, back)
    check_same_files(folder, back)
    return ""


CHECKS: dict[str, Callable[[Trial], str]] = {
    "from_peft": from_peft,
    "to_peft": to_peft,
    "bf16": bf16,
    "merge": merge,
    "files": files,
}


def results(workshop: Workshop, subject: Subject, disturb: str | None = None) -> Iterator[Result]:
    """Yields the results of a subject. disturb: `value` or `alpha`, which is changed before the other side loads."""
    with tempfile.TemporaryDirectory() as scratch:
        trial = Trial(workshop, subject, Path(scratch), disturb)
        for direction in subject.directions():
            try:
                status, why = PASSED, CHECKS[direction](trial)
            except Refused as refused:
                status, why = refused.by, str(refused)
            except Exception as error:  # any exception means that the two sides do not agree
                status, why = FAILED, first_line(error)
            yield Result(subject, direction, status, why.replace(f"{scratch}/", ""))
