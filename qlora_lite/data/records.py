"""Records of training data, read from a JSONL file and checked.

A record is a JSON object with the keys of one of these shapes, tried in this order. Other keys are ignored:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}
    {"prompt": "...", "completion": "..."}
    {"instruction": "...", "input": "...", "output": "..."}        `input` is optional
    {"text": "..."}

Where no answer is needed, `{"prompt": "..."}` is a record too. A file may mix the shapes. Any other line raises
CheckpointError with the file and the line number.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypedDict

from qlora_lite.checkpoints.files import excerpt, open_regular, reason
from qlora_lite.data.chat.messages import check_text, checked_messages
from qlora_lite.errors import CheckpointError

SHAPES: tuple[tuple[str, ...], ...] = (("messages",), ("prompt", "completion"), ("instruction", "output"), ("text",))
SHAPES_IN_WORDS = "messages | prompt, completion | instruction, input (optional), output | text"
PROMPT_ALONE = ("prompt",)
# 32 MiB of text are about ten million tokens.
LONGEST_LINE = 32 << 20


class Record(TypedDict, total=False):
    """A checked record. It has the keys of one shape, and maybe others."""

    messages: list[dict[str, object]]
    tools: list[object] | str
    documents: list[object]
    chat_template_kwargs: dict[str, object]
    prompt: str
    completion: str
    instruction: str
    input: str | None
    output: str
    text: str


def read_records(path: str | Path, prompts_too: bool = False) -> list[Record]:
    """Returns the records of a JSONL file, one for each line that is not blank.

    prompts_too: also accept a prompt without a completion.
    Raises CheckpointError with the file and the line for what is not UTF-8, not a JSON object or of none of the shapes.
    """
    records = [
        _parse_line(line, f"{path}, line {number}", prompts_too)
        for number, line in enumerate(_lines(Path(path)), 1)
        if line.strip()
    ]
    if not records:
        raise CheckpointError(f"{path} holds no records; expected one JSON object per line")
    return records


def _lines(path: Path) -> Iterator[bytes]:
    """Yields the lines without a byte order mark. A line above LONGEST_LINE is refused before all of it is read."""
    with open_regular(path, "a JSONL file") as file:
        for number in itertools.count(1):
            try:
                line = file.readline(LONGEST_LINE + 1)
            except OSError as error:
                raise CheckpointError(f"{path}, line {number}: cannot be read: {reason(error)}") from error
            if not line:
                return
            if len(line) > LONGEST_LINE:
                raise CheckpointError(f"{path}, line {number}: longer than {LONGEST_LINE:,} bytes; split the record")
            yield (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).removesuffix(b"\n")


def _parse_line(line: bytes, place: str, prompts_too: bool) -> Record:
    try:
        record: Record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        bad = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        raise CheckpointError(f"{place}: not UTF-8 ({bad}); save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        # str(error) of a JSONDecodeError would count lines from this one.
        why = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        wrong = f"not valid JSON ({why}), got {excerpt(line.decode('utf-8'))}"
        raise CheckpointError(f"{place}: {wrong}; write one JSON object per line") from error
    check_record(record, place, prompts_too)
    return record


def check_record(record: object, place: str = "record", prompts_too: bool = False) -> None:
    """Raises CheckpointError unless `record` is an object of one of the shapes. The message begins with `place`."""
    if not isinstance(record, dict):
        got = f"{type(record).__name__} {excerpt(record)}"
        raise CheckpointError(f"{place}: expected a JSON object, got {got}; write one JSON object per line")
    shape = shape_of(record, place, prompts_too)
    if shape == ("messages",):
        checked_messages(record["messages"], place)
        return
    for key in shape:
        check_text(record[key], key, place)
    if shape == ("instruction", "output") and record.get("input") is not None:
        check_text(record["input"], "input", place)


def shape_of(record: Mapping[str, object], place: str, prompts_too: bool = False) -> tuple[str, ...]:
    """Returns the keys of the record's shape, one of SHAPES or PROMPT_ALONE. Raises CheckpointError if it has none."""
    for shape in (*SHAPES, PROMPT_ALONE) if prompts_too else SHAPES:
        if all(key in record for key in shape):
            return shape
    keys = ", ".join(sorted(map(str, record))) or "none"
    words = f"{SHAPES_IN_WORDS} | prompt" if prompts_too else SHAPES_IN_WORDS
    raise CheckpointError(f"{place}: unknown shape with keys {keys}; use one of: {words}")
