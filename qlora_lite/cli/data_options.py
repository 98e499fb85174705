"""Options of the commands that read records, and the records of a training run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_lite.cli.options import InFile
from qlora_lite.cli.training.task_records import labels_of_records
from qlora_lite.data.shapes import KEYS
from qlora_lite.data.tasks.shapes import TASK_KEYS
from qlora_lite.errors import ConfigError
from qlora_lite.progress.work import working

if TYPE_CHECKING:
    from qlora_lite.data.encoding import Tokenizer
    from qlora_lite.data.images.processor import ImageProcessor
    from qlora_lite.data.mixture import Mixture
    from qlora_lite.data.tasks.labels import Labels
    from qlora_lite.data.tokenization import DataConfig, TokenizedSet
    from qlora_lite.tasks import Task

SOURCES_HELP = (
    "Records: a JSONL, JSON, CSV, TSV, parquet or Arrow file, also of gzip or zstd, a folder of them, or name:split of "
    "a data set on the hub. Several are joined; data=0.7 gives each its share of an epoch."
)
ALL_KEYS = tuple(dict.fromkeys([*KEYS, *TASK_KEYS]))
Fields = Annotated[
    list[str] | None,
    typer.Option("--field", help=f"Name of a key in the records, as prompt=question. Keys: {', '.join(ALL_KEYS)}."),
    InFile(pairs=True),
]
Limit = Annotated[int | None, typer.Option(help="Records of each source that are read, from its first one on.")]
SkipBad = Annotated[int, typer.Option(help="Bad records of each source that are left out; more are an error.")]
Learn = Annotated[
    str,
    typer.Option(help="Tokens to learn: answers, last-answer (of a conversation) or all."),
    InFile(words="qlora_lite.data.chat.messages:LEARN"),
]
LearnEmptyReasoning = Annotated[
    bool,
    typer.Option(
        "--learn-empty-reasoning/--no-learn-empty-reasoning",
        help="Learn an empty think block that only the chat template wrote, too.",
    ),
]
TokenCache = Annotated[bool, typer.Option(help="Keep the tokens on disk, next to the data, for the next start.")]
MaxLength = Annotated[int, typer.Option(help="Tokens that longer examples are truncated to.")]


def fields_named(fields: list[str] | None) -> dict[str, str]:
    """Returns `{"prompt": "question"}` for `["prompt=question"]`. Raises ConfigError for anything else."""
    named: dict[str, str] = {}
    for text in fields or ():
        key, equals, name = text.partition("=")
        if not (key and equals and name):
            raise ConfigError(f"--field must be KEY=NAME, as prompt=question; got {text!r}")
        if key in named:
            raise ConfigError(f"--field names {key} twice: {named[key]} and {name}; leave out one")
        named[key] = name
    return named


def data_config(options: Mapping[str, Any], run_date: date | None = None, task: str | None = None) -> DataConfig:
    """Returns the settings of the records that the options of a command ask for.

    task: of a model that is not a causal language model.
    """
    from qlora_lite.data.tokenization import DataConfig

    given = {
        "max_length": options["max_length"],
        "learn": options["learn"],
        "learn_empty_reasoning": options["learn_empty_reasoning"],
        "fields": fields_named(options["field"]),
        "limit": options["limit"],
        "skip_bad": options["skip_bad"],
        "date": run_date,
    }
    if task is None:
        return DataConfig(**given)
    from qlora_lite.data.tasks.config import TaskDataConfig

    return TaskDataConfig(**given, task=task)


def input_paths(sources: Sequence[str]) -> list[Path]:
    """Returns the files and folders that sources read, which no output may replace."""
    from qlora_lite.data.sources.source import parse_source

    paths = [Path(parse_source(source).location) for source in sources]
    return [path for path in paths if path.exists()]


@contextmanager
def tokenizing_progress() -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of records so far, which are shown on stderr."""
    with working("tokenizing", unit="records") as work:
        yield work.reach


@dataclass(frozen=True)
class TrainingData:
    """The records of a run. examples: of them those that are trained on. held_out: others, None without any.

    images: reads their images.
    """

    tokenized: TokenizedSet
    examples: Mixture
    held_out: Mixture | None
    images: ImageProcessor | None = None

    def warning(self) -> str | None:
        """A sentence if records are trained on that are held out too."""
        from qlora_lite.data.mixture import common_records

        common = 0 if self.held_out is None else common_records(self.held_out, self.examples)
        return f"{common:,} of the held-out examples are trained on too" if common else None


def training_data(
    data: Sequence[str],
    eval_data: Sequence[str] | None,
    eval_share: float | None,
    tokenizer: Tokenizer,
    config: DataConfig,
    cache: bool,
    images: ImageProcessor | None = None,
) -> TrainingData:
    """Reads the records of a run. Raises ConfigError if both `eval_data` and `eval_share` are given."""
    from qlora_lite.data.tokenization import tokenize_sources

    if eval_data and eval_share is not None:
        raise ConfigError("--eval-data and --eval-share both choose what is held out; leave out one")
    with tokenizing_progress() as show:
        tokenized = tokenize_sources(data, tokenizer, config, cache, show, images)
        held_out = tokenize_sources(eval_data, tokenizer, config, cache, show, images).examples if eval_data else None
    if eval_share is not None:
        return TrainingData(tokenized, *tokenized.examples.held_out(eval_share), images)
    return TrainingData(tokenized, tokenized.examples, held_out, images)


def run_date_of(output: Path) -> date:
    """The date that the chat template writes in a resumed run: that of the run's start."""
    from qlora_lite.checkpoints.files import read_json
    from qlora_lite.errors import CheckpointError
    from qlora_lite.training.run_checkpoints import DATA_FILE

    path = output / DATA_FILE
    if not path.exists():  # no step was done, or the run is older than this file
        return date.today()
    try:
        return date.fromisoformat(str(read_json(path)["date"]))
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} has no date of the run; delete it to go on with today's") from error


def described_records(
    options: Mapping[str, Any], tokenizer: Tokenizer, task: Task | None
) -> tuple[TrainingData, Labels | None, dict[str, object]]:
    """Reads the records, and prints what is learned; returns them, their labels, and the notes that a run keeps.

    task: of a model that is not a causal language model (`task_with_records`); its records have labels.
    """
    from qlora_lite.checkpoints.hub import checkpoint_folder, read_config
    from qlora_lite.data.images.processor import ImageProcessor
    from qlora_lite.data.summary import Summary, summarize
    from qlora_lite.data.tasks.summary import TaskSummary, summarize_task
    from qlora_lite.training.distributed import is_first_process
    from qlora_lite.training.loop import check_length_by_config

    run_date = run_date_of(options["output"]) if options["resume"] else date.today()
    config, cache = data_config(options, run_date, None if task is None else task.name), options["token_cache"]
    images = ImageProcessor(options["model"], options["text_only"])
    held_out_in = options["eval_data"], options["eval_share"]
    records = training_data(options["data"], *held_out_in, tokenizer, config, cache, images)
    model_config = read_config(checkpoint_folder(options["model"], weights=False))
    summary: Summary | TaskSummary
    if task is None:
        labels, summary = None, summarize(records.tokenized)
        lines = summary.in_words(options["packing"])
    else:
        labels = labels_of_records(records.tokenized.examples, records.held_out, task, options, model_config)
        summary = summarize_task(records.tokenized, labels)
        lines = summary.in_words(labels)
    held_out = None if records.held_out is None else len(records.held_out)
    if is_first_process():
        notes = (held_out and f"{held_out:,} examples are held out", records.warning())
        print("\n".join([*lines, *(note for note in notes if note)]))
    check_length_by_config(model_config, records.tokenized.longest)
    return records, labels, {"date": run_date.isoformat(), **summary.to_json(), "examples_held_out": held_out}
