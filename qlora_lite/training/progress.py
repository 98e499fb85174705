"""The progress of training on stderr: a bar on a terminal, ten lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from qlora_lite.memory.report import readable_bytes

LINES_WITHOUT_TERMINAL = 10


class Step(Protocol):
    """The metrics of a step that are shown."""

    @property
    def step(self) -> int: ...
    @property
    def loss(self) -> float: ...
    @property
    def gradient_norm(self) -> float: ...
    @property
    def tokens_per_second(self) -> float: ...
    @property
    def peak_bytes(self) -> int | None: ...


def described(step: Step) -> str:
    """Returns loss, gradient norm, speed and peak memory of a step as one line."""
    peak = "" if step.peak_bytes is None else f"  peak {readable_bytes(step.peak_bytes)}"
    return f"loss {step.loss:.4f}  gradient {step.gradient_norm:.3f}  {step.tokens_per_second:.0f} tokens/s{peak}"


class HeldOut(Protocol):
    """The figures of an evaluation that are shown."""

    @property
    def step(self) -> int: ...
    @property
    def held_out_loss(self) -> float: ...
    @property
    def scores(self) -> Mapping[str, float | None]: ...


def described_evaluation(evaluation: HeldOut, steps: int) -> str:
    """Returns step, held-out loss and scores as one line. steps: of the run."""
    shown = {name.replace("_", " "): value for name, value in evaluation.scores.items() if value is not None}
    scores = "".join(f"  {name} {value:.4g}" for name, value in shown.items())
    return f"step {evaluation.step}/{steps}  held-out loss {evaluation.held_out_loss:.4f}{scores}"


def say(text: str, shown: bool) -> None:
    """Prints a line on stderr if `shown`."""
    from rich.console import Console

    if shown:
        Console(stderr=True).print(text, highlight=False, soft_wrap=True, markup=False)


@contextmanager
def training_progress(steps: int, shown: bool) -> Iterator[tuple[Callable[[Step], None], Callable[[str], None]]]:
    """Yields a function to call after each step, and one to print a line; on stderr: stdout is the program's."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not shown:
        yield lambda step: None, lambda text: None
    elif not console.is_terminal:
        every = max(1, steps // LINES_WITHOUT_TERMINAL)

        def line(step: Step) -> None:
            if step.step % every == 0 or step.step in (1, steps):
                console.print(f"step {step.step}/{steps}  {described(step)}", highlight=False, soft_wrap=True)

        yield line, lambda text: say(text, shown)
    else:
        text = TextColumn("{task.fields[figures]}")
        with Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), text, console=console) as bar:
            task = bar.add_task("train", total=steps, figures="")
            yield (
                lambda step: bar.update(task, completed=step.step, figures=described(step)),
                lambda text: bar.console.print(text, highlight=False, soft_wrap=True, markup=False),
            )
