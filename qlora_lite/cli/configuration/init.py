"""`qlora-lite init`: asks five questions, looks at model, records and memory, and writes the configuration of a run."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_lite.cli.configuration.proposal import (
    MOST_TOKENS,
    Shape,
    as_file,
    held_out_share,
    proposed,
    shape_within,
    steps_of,
)
from qlora_lite.cli.configuration.questions import Asker, Question
from qlora_lite.cli.configuration.schema import settings_of
from qlora_lite.cli.data_options import input_paths
from qlora_lite.cli.options import Json, TaskName, check_output, finish
from qlora_lite.cli.train import train
from qlora_lite.errors import ConfigError

if TYPE_CHECKING:
    from qlora_lite.cli.data_options import TrainingData

# A model that every machine trains.
SMALL_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DATA_ENDINGS = (".jsonl", ".parquet", ".csv", ".arrow", ".tsv")
EPOCHS = "3"
OUTPUT = "out/run"
# Of the free memory, what is left to others.
USED_SHARE = 0.9


def nearby_model() -> str:
    """Returns the first checkpoint in the working directory, or the id of a small model."""
    found = sorted(path.parent for path in Path().glob("*/config.json") if any(path.parent.glob("*.safetensors")))
    return str(found[0]) if found else SMALL_MODEL


def nearby_data() -> str | None:
    """Returns the first file of records in the working directory, those for training first; None without any."""
    files = sorted(path for path in Path().iterdir() if path.name.endswith(DATA_ENDINGS) and path.is_file())
    likely = [path for path in files if path.stem in ("data", "train")]
    return next((str(path) for path in [*likely, *files]), None)


def free_memory() -> str:
    """Returns most of the memory that is free now, as a size."""
    from qlora_lite.memory.counters import free_bytes

    gib = free_bytes() * USED_SHARE / 2**30
    return f"{int(gib)}GiB" if gib >= 8 else f"{int(gib * 1024)}MiB"


def free_output() -> str:
    """Returns a folder for the run that is not there yet."""
    names = (OUTPUT, *(f"{OUTPUT}-{number}" for number in range(2, 10_000)))
    return next(name for name in names if not os.path.lexists(name))


def _checked_model(text: str) -> str:
    from qlora_lite.checkpoints.hub import checkpoint_folder, load_tokenizer, read_config

    read_config(checkpoint_folder(text, weights=False))
    load_tokenizer(text)
    return text


def _checked_epochs(text: str) -> float:
    from qlora_lite.training.config import steps_of_epochs

    try:
        epochs = float(text)
    except ValueError:
        raise ConfigError(f"--epochs must be a number of passes over the records, as 3; got {text[:40]!r}") from None
    steps_of_epochs(epochs, 1)
    return epochs


def _checked_size(text: str) -> int:
    from qlora_lite.checks import byte_count

    return byte_count("--memory must be", text)


def _checked_output(text: str, inputs: Iterable[str | None]) -> Path:
    check_output(Path(text), False, *(place for place in inputs if place is not None))
    return Path(text)


@dataclass(frozen=True)
class _Examined:
    """What the records of the proposed run are. most: the tokens that nearly all examples have at most."""

    sources: list[str]
    data: TrainingData
    share: float | None
    most: int
    max_length: int

    @property
    def has_images(self) -> bool:
        return self.data.examples.has_images


class _Records:
    """Reads the records of the proposed run, when the question for them is answered."""

    def __init__(self, model: str, task: str | None) -> None:
        from qlora_lite.checkpoints.hub import checkpoint_folder, load_tokenizer, read_config
        from qlora_lite.cli.training.task_records import task_with_records
        from qlora_lite.positions import longest_sequence

        defaults = {name: setting.default for name, setting in settings_of(train).items()}
        config = read_config(checkpoint_folder(model, weights=False))
        self._options: dict[str, Any] = {**defaults, "model": model, "task": task}
        self._longest = longest_sequence(config) or 2 * MOST_TOKENS
        self._options["max_length"] = self._longest
        self.task = task_with_records(self._options)
        self._tokenizer = load_tokenizer(model)

    def why_not(self, examined: _Examined) -> str | None:
        """Why the memory cannot be predicted; None if it can."""
        if self.task is not None:
            return f"it is predicted for causal language models, and this one is made for {self.task.name}"
        return "it is predicted for rows of text, and the records have images" if examined.has_images else None

    def read(self, sources: list[str]) -> _Examined:
        """Returns what the records are; prints what is learned of them."""
        from qlora_lite.cli.data_options import data_config, training_data
        from qlora_lite.data.images.processor import ImageProcessor
        from qlora_lite.data.summary import summarize

        config = data_config(self._options, task=None if self.task is None else self.task.name)
        images = ImageProcessor(self._options["model"], False)
        data = training_data(sources, None, None, self._tokenizer, config, True, images)
        most = longest = min(data.tokenized.longest, MOST_TOKENS)
        if self.task is None:
            summary = summarize(data.tokenized, self._longest)
            print("\n".join(summary.in_words()))
            most, longest = summary.lengths.most, min(summary.lengths.proposed_max_length, MOST_TOKENS)
        else:
            print(f"{len(data.examples):,} examples of {self.task.name}")
        share = held_out_share(len(data.examples))
        if share is not None:
            kept, held_out = data.examples.held_out(share)
            data = replace(data, examples=kept, held_out=held_out)
        return _Examined(sources, data, share, most, longest)


Memory = Annotated[str | None, typer.Option(help="Memory to train in, as 24GiB. Default: most of what is free now.")]


def init(
    file: Annotated[Path, typer.Argument(help="Configuration file to write.")] = Path("run.yaml"),
    model: Annotated[str | None, typer.Option(help="Folder of a checkpoint, or an id on the hub.")] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Records, as `train` takes them; repeatable.")
    ] = None,
    task: TaskName = None,
    memory: Memory = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the records. Default: 3.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the run. Default: out/run, or a number more.")] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Take the defaults of what is not given, and ask nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing configuration file.")] = False,
    json: Json = False,
) -> None:
    """Ask five questions and write run.yaml, with the reason for each setting; an option answers its question.

    The records are read, and the memory is predicted; nothing is trained.
    """
    from qlora_lite.checkpoints.files import new_file

    check_file(file, overwrite)
    passes = None if epochs is None else f"{epochs:g}"
    for given, check in ((passes, _checked_epochs), (memory, _checked_size)):
        if given is not None:
            check(given)  # before the records are read
    if output is not None:
        _checked_output(output, (model, *(data or ())))
    found, figures = _proposal(Asker(defaults=yes), model, task, data, memory, passes, output)
    with new_file(file, overwrite) as written:
        written.write(as_file(settings_of(train), found).encode())
    told = {name: value for name, value in figures.items() if json or value is not None}
    finish({"written": str(file), **told, "next": f"qlora-lite train {file}"}, json)


def check_file(file: Path, overwrite: bool) -> None:
    """Raises ConfigError or CheckpointError if a configuration cannot be written there."""
    from qlora_lite.checkpoints.files import check_writable

    if file.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"the file must be named *.yaml or *.yml; got {file}")
    check_writable(file, file.suffix, overwrite)


def _proposal(
    asker: Asker,
    model: str | None,
    task: str | None,
    data: list[str] | None,
    memory: str | None,
    epochs: str | None,
    output: str | None,
) -> tuple[dict[str, tuple[Any, str]], dict[str, object]]:
    """Asks what is not given. Returns the settings of the run with their reasons, and figures to tell."""
    from qlora_lite.planning.memory_budget import device_memory

    chosen = asker.answer(Question("Model", "--model", nearby_model(), _checked_model, SMALL_MODEL), model)
    records = _Records(chosen, task)
    if data:
        examined = records.read(data)
    else:
        question = Question("Records", "--data", nearby_data(), lambda text: records.read([text]), "data.jsonl")
        examined = asker.answer(question, None)

    def shape_in(text: str) -> Shape:
        room, count = device_memory(_checked_size(text)), len(examined.data.examples)
        return shape_within(chosen, room, count, examined.max_length, records.why_not(examined))

    shape = asker.answer(Question("Memory to train in", "--memory", free_memory(), shape_in, "24GiB"), memory)
    inputs = (chosen, *map(str, input_paths(examined.sources)))
    passes = asker.answer(Question("Passes over the records", "--epochs", EPOCHS, _checked_epochs, "3"), epochs)
    place = Question("Folder of the run", "--output", free_output(), lambda text: _checked_output(text, inputs), OUTPUT)
    folder = asker.answer(place, output)
    if shape.predicted is None:
        print(shape.reason)
    answers = {"model": chosen, "task": task, "data": examined.sources, "epochs": passes, "output": folder}
    found = proposed({**answers, "eval_share": examined.share}, examined.data, shape, examined.most)
    return found, {
        "steps": steps_of(len(examined.data.examples), passes, shape),
        "examples_of_a_step": shape.rows * shape.gradient_accumulation,
        "max_length": shape.max_length,
        "predicted_peak_bytes": shape.predicted,
    }
