"""A file of answers: batches of prompts of about one length, written in the order of the prompts, and resumable."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_lite.checkpoints.base_identity import model_identity
from qlora_lite.checkpoints.files import check_writable, new_file
from qlora_lite.checkpoints.safetensors_write import raw_bytes
from qlora_lite.checks import is_count, require
from qlora_lite.compute.environment import arithmetic
from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.generation.answer_journal import AnswerJournal, journal_path, open_journal
from qlora_lite.generation.answering import Answer, answer_batch
from qlora_lite.generation.prompts import Prompt, Prompts
from qlora_lite.generation.record_prompts import PromptSet
from qlora_lite.generation.settings import GenerationSettings, draws
from qlora_lite.lora.adapters import adapter_parameters, adapters_disabled, lora_layers
from qlora_lite.signals import check_signals, deferred_signals
from qlora_lite.system import locked

SUFFIX = ".jsonl"


@dataclass(frozen=True)
class WrittenAnswers:
    """What was written. resumed: the prompts of them that an earlier process had answered."""

    prompts: int
    resumed: int
    new_tokens: int


def check_answer_file(output: Path, overwrite: bool) -> None:
    """Raises the errors of `check_writable`. An output with a journal is one whose writing only has to be finished."""
    check_writable(output, SUFFIX, overwrite or journal_path(output).exists())


def batches_by_length(prompts: Sequence[Prompt], batch_size: int) -> list[list[int]]:
    """Returns the numbers of the prompts of each batch: of about one length, the longest first."""
    numbers = sorted(range(len(prompts)), key=lambda number: -len(prompts[number].tokens))
    return [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]


def write_answers(
    model: Any,
    prompts: Prompts,
    asked: PromptSet,
    output: str | Path,
    settings: GenerationSettings | None = None,
    *,
    batch_size: int = 8,
    compare: bool = False,
    overwrite: bool = False,
    notes: Mapping[str, object] | None = None,
    on_answers: Callable[[int], None] | None = None,
) -> WrittenAnswers:
    """Answers prompts in batches, and writes a JSON line for each in their order; `output` appears when it is whole.

    Answers are kept in `output` + `.partial` meanwhile. The same call goes on from there, whatever ended it.
    A line has `prompt`, `answer`, `finish_reason`, `tokens`, and `expected` if the record has an answer. compare: the
    base answers too (`base_answer`, ...).
    notes: further facts that must be the same for the call to go on. on_answers: gets the number of prompts answered.

    Raises ConfigError for wrong settings; CheckpointError if `output` exists (unless `overwrite`), cannot be written,
    or has unfinished answers of another model, other prompts or settings (unless `overwrite`); Stopped for a signal.
    """
    output, settings = Path(output), settings or GenerationSettings()
    require(is_count(batch_size, 1), "batch_size must be at least 1", batch_size)
    if compare and not lora_layers(model):
        raise ConfigError("compare needs a model with an adapter in use; without one, base and model are the same")
    draws(model.generation_config, settings)
    check_answer_file(output, overwrite)
    options = {**asdict(settings), "batch_size": batch_size, "compare": compare, **(notes or {})}
    date = prompts.date_written and prompts.date_written.isoformat()
    header = {"settings": options, "date": date, "prompts": asked.fingerprint(), **_identity(model)}
    with deferred_signals(), _only_writer(output):
        with open_journal(journal_path(output), header, overwrite) as journal:
            resumed = len(journal.done)
            for number, batch in enumerate(batches_by_length(asked.prompts, batch_size)):
                check_signals()
                if not {*batch} <= journal.done:
                    journal.add(_answers(model, prompts, asked.prompts, batch, settings, compare, number))
                if on_answers is not None:
                    on_answers(len(journal.done))
            tokens = _finish(output, journal, asked.prompts, overwrite)
        journal_path(output).unlink()  # everything in it is in the output now
    return WrittenAnswers(len(asked.prompts), resumed, tokens)


@contextmanager
def _only_writer(output: Path) -> Iterator[None]:
    """Within the block no other process writes this output. Turns the system's errors into CheckpointError."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with locked(output.with_name(f"{output.name}.lock")):
            yield
    except BlockingIOError as error:
        raise CheckpointError(
            f"{output} is being written by another process ({error.strerror}); wait for it, or name another file"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{output} cannot be written: {error.strerror or error}; the same call goes on once that is mended"
        ) from error


def _identity(model: Any) -> dict[str, object]:
    """What an answer depends on besides prompts and settings."""
    base, adapter = model_identity(model), hashlib.sha256()
    for name, parameter in adapter_parameters(model).items():
        adapter.update(name.encode() + raw_bytes(parameter.detach().cpu().contiguous()))
    for name, layer in lora_layers(model).items():
        adapter.update(f"{name} {layer.scaling} {layer.variant.name}".encode())
    return {
        "model": None if base is None else base.to_json(),
        "adapter": adapter.hexdigest(),
        "generation config": json.loads(model.generation_config.to_json_string()),
        "machine": arithmetic(model.device),
    }


def _answers(
    model: Any,
    prompts: Prompts,
    asked: Sequence[Prompt],
    batch: Sequence[int],
    settings: GenerationSettings,
    compare: bool,
    number: int,
) -> dict[int, dict[str, object]]:
    """The answers of a batch, as lines have them, by the numbers of the prompts."""
    rows = [asked[index].tokens for index in batch]
    found = [_line(answer) for answer in answer_batch(model, prompts, rows, settings, number)]
    if compare:
        with adapters_disabled(model):
            bases = answer_batch(model, prompts, rows, settings, number)
        for line, base in zip(found, bases, strict=True):
            line |= {f"base_{key}": value for key, value in _line(base).items()}
    return dict(zip(batch, found, strict=True))


def _line(answer: Answer) -> dict[str, object]:
    return {"answer": answer.text, "finish_reason": answer.finish_reason, "tokens": answer.tokens}


def _finish(output: Path, journal: AnswerJournal, asked: Sequence[Prompt], overwrite: bool) -> int:
    """Writes the output from a journal that has all answers; returns the number of tokens that were written.

    An output that is there and the same was written by a process that was killed before it removed the journal.
    """
    if output.exists() and not overwrite and _is_written(output, journal, asked):
        return _new_tokens(journal, asked)
    with new_file(output, overwrite) as file:
        file.writelines(_lines(journal, asked))
    return _new_tokens(journal, asked)


def _lines(journal: AnswerJournal, asked: Sequence[Prompt]) -> Iterator[bytes]:
    for number, prompt in enumerate(asked):
        line = {"prompt": prompt.shown, "expected": prompt.expected, **journal.answer(number)}
        kept = {key: value for key, value in line.items() if key != "expected" or value is not None}
        yield json.dumps(kept, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace") + b"\n"


def _is_written(output: Path, journal: AnswerJournal, asked: Sequence[Prompt]) -> bool:
    with open(output, "rb") as file:
        return all(one == other for one, other in itertools.zip_longest(file, _lines(journal, asked)))


def _new_tokens(journal: AnswerJournal, asked: Sequence[Prompt]) -> int:
    answers = (journal.answer(number) for number in range(len(asked)))
    return sum(int(str(answer.get(key, 0))) for answer in answers for key in ("tokens", "base_tokens"))
