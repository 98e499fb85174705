"""The shapes of a record for tasks other than that of a causal language model.

    text, label                        a class, or a number to regress on; `labels`, a list, for several classes at once
    text_a, text_b, label              the same for two texts (also premise and hypothesis, sentence1 and sentence2)
    messages, label                    the same for a conversation
    chosen, rejected                   a preference, for a reward: texts, or messages; after a prompt, or whole
    tokens, labels                     words, and a class for each
    prompt, completion                 what an encoder reads, and what the decoder writes (also input and target, and
                                       instruction, input, output)
    anchor, positive, negative         texts that mean the same, and optionally one that does not
    text                               text of which some tokens are hidden

The first shape of a task whose keys a record has is taken. A key that holds null counts as absent.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from qlora_lite.checkpoints.files import excerpt
from qlora_lite.data.chat.messages import check_text, checked_messages
from qlora_lite.data.shapes import (
    SHAPES,
    TEMPLATE_KEYS,
    Answered,
    Conversation,
    Part,
    Record,
    Shape,
    parsed_list,
)
from qlora_lite.errors import CheckpointError

# The names of two texts in transformers' examples and in data sets.
PAIRS = (
    *(("text_a", "text_b"), ("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2")),
    ("question", "sentence"),
)
CHATS = {shape.name: shape for shape in SHAPES if shape.name in ("messages", "conversations")}
CLASSIFIERS = ("sequence-classification", "token-classification")


def _label(record: Record, place: str) -> object:
    """The label of a record: a name, a number, or the list of names in `labels`."""
    if "labels" in record:
        names = parsed_list(record["labels"], "labels", place)
        if not isinstance(names, list) or not all(isinstance(name, (str, int)) for name in names):
            raise CheckpointError(f"{place}: labels must be a list of names or whole numbers, got {excerpt(names)}")
        return [_checked(name, "labels", place) for name in names]
    return _checked(record["label"], "label", place)


def _checked(label: object, name: str, place: str) -> object:
    from qlora_lite.checks import is_finite  # needs torch, which the help of the commands does not

    if isinstance(label, str):
        check_text(label, name, place)
        if label.strip():
            return label
    elif isinstance(label, bool):
        return str(label).lower()
    elif isinstance(label, (int, float)) and is_finite(label):
        return label
    raise CheckpointError(f"{place}: {name} must be a name or a finite number, got {excerpt(label)}")


def _read_text(record: Record, place: str) -> Answered:
    check_text(record["text"], "text", place)
    return Answered((Part(str(record["text"])),), _label(record, place))


def _read_pair(keys: tuple[str, str], record: Record, place: str) -> Answered:
    for key in keys:
        check_text(record[key], key, place)
    return Answered((Part(str(record[keys[0]]), str(record[keys[1]])),), _label(record, place))


def _read_chat(shape: Shape, record: Record, place: str) -> Answered:
    conversation = shape.read(record, place)
    assert isinstance(conversation, Conversation)
    return Answered((Part(conversation=conversation),), _label(record, place))


def _read_preference(record: Record, place: str) -> Answered:
    parts = tuple(_answer_part(record, key, place) for key in ("chosen", "rejected"))
    if parts[0] == parts[1]:
        raise CheckpointError(f"{place}: chosen and rejected are the same; leave the record out")
    return Answered(parts)


def _answer_part(record: Record, key: str, place: str) -> Part:
    """One side of a preference: text that continues the prompt, messages that do, or a conversation of its own."""
    answer, prompt = record[key], record.get("prompt")
    if isinstance(answer, list):
        if prompt is not None and not isinstance(prompt, list):
            raise CheckpointError(f"{place}: prompt must be a list of messages, as {key} is; got {excerpt(prompt)}")
        messages = checked_messages([*(prompt or []), *answer], place)
        given = {name: record[name] for name in TEMPLATE_KEYS if name in record}
        shape = CHATS["messages"].read({"messages": messages, **given}, place)
        assert isinstance(shape, Conversation)
        return Part(conversation=shape)
    check_text(answer, key, place)
    if prompt is None:
        return Part(str(answer), ends=True)
    if isinstance(prompt, list):
        messages = checked_messages([*prompt, {"role": "assistant", "content": answer}], place)
        return Part(conversation=Conversation(messages, {}))
    check_text(prompt, "prompt", place)
    return Part(str(prompt), str(answer), ends=True)


def _read_words(record: Record, place: str) -> Answered:
    words = parsed_list(record["tokens"], "tokens", place)
    labels = parsed_list(record["labels"], "labels", place)
    if not isinstance(words, list) or not all(isinstance(word, str) and word.strip() for word in words) or not words:
        raise CheckpointError(f"{place}: tokens must be a list of words, at least one, got {excerpt(words)}")
    if not isinstance(labels, list) or len(labels) != len(words):
        got = f"{len(labels)} labels" if isinstance(labels, list) else f"labels {excerpt(labels)}"
        raise CheckpointError(f"{place}: labels must be one for each of the {len(words)} tokens, got {got}")
    for word in words:
        check_text(word, "tokens", place)
    for label in labels:
        if not isinstance(label, (str, int)):
            raise CheckpointError(f"{place}: labels must be names or whole numbers, got {excerpt(label)}")
    return Answered((Part(words=tuple(words)),), [_checked(label, "labels", place) for label in labels])


def _read_source(keys: tuple[str, ...], target: str, record: Record, place: str) -> Answered:
    """What an encoder reads, the texts of some keys divided by blank lines, and what the decoder writes."""
    given = [key for key in keys if key in record]
    for key in (*given, target):
        check_text(record[key], key, place)
    source = "\n\n".join(text for key in given if (text := str(record[key])))
    return Answered((Part(source), Part(str(record[target]), target=True)))


def _read_similar(record: Record, place: str) -> Answered:
    keys = [key for key in ("anchor", "positive", "negative") if key in record]
    for key in keys:
        check_text(record[key], key, place)
    return Answered(tuple(Part(str(record[key])) for key in keys))


def _read_plain(record: Record, place: str) -> Answered:
    check_text(record["text"], "text", place)
    return Answered((Part(str(record["text"])),))


def _to_target(keys: tuple[str, ...], optional: tuple[str, ...], target: str) -> Shape:
    read = functools.partial(_read_source, (*keys, *optional), target)
    return Shape(" and ".join([keys[0], target]), (*keys, target), optional, read)


def _labelled(name: str, keys: tuple[str, ...], optional: tuple[str, ...], read: object) -> list[Shape]:
    """The shapes of texts with a label, and with several labels."""
    return [
        Shape(f"{name} and {key}", (*keys, key), optional, read)  # type: ignore[arg-type]
        for key in ("label", "labels")
    ]


_SEQUENCES: list[Shape] = [
    Shape("chosen and rejected", ("chosen", "rejected"), ("prompt", *TEMPLATE_KEYS), _read_preference),
    *(
        shape
        for chat in CHATS.values()
        for shape in _labelled(chat.name, chat.required, chat.optional, functools.partial(_read_chat, chat))
    ),
    *(
        shape
        for pair in PAIRS
        for shape in _labelled(" and ".join(pair), pair, (), functools.partial(_read_pair, pair))
    ),
    *_labelled("text", ("text",), (), _read_text),
]
TASK_SHAPES: Mapping[str, tuple[Shape, ...]] = {
    "sequence-classification": tuple(_SEQUENCES),
    "token-classification": (Shape("tokens and labels", ("tokens", "labels"), (), _read_words),),
    "seq2seq-lm": (
        _to_target(("prompt",), (), "completion"),
        _to_target(("input",), (), "target"),
        _to_target(("instruction",), ("input",), "output"),
    ),
    "masked-lm": (Shape("text", ("text",), (), _read_plain),),
    "embedding": (Shape("anchor and positive", ("anchor", "positive"), ("negative",), _read_similar),),
}
# Keys of all tasks; `--field` may name them.
TASK_KEYS = tuple(
    dict.fromkeys(
        key for shapes in TASK_SHAPES.values() for shape in shapes for key in (*shape.required, *shape.optional)
    )
)


def _words(shapes: tuple[Shape, ...]) -> str:
    return " | ".join(shape.in_words for shape in shapes if not shape.name.endswith("and labels") or len(shapes) == 1)


def task_shape_of(task: str, record: Record, place: str) -> Shape:
    """Returns the shape of a record of a task. Raises CheckpointError, beginning with `place`, if it has none.

    The sentence says which other task takes such a record.
    """
    shapes = TASK_SHAPES[task]
    for shape in shapes:
        if all(key in record for key in shape.required):
            return shape
    keys = ", ".join(sorted(map(str, record))) or "none"
    others = [
        other
        for other, theirs in {"causal-lm": SHAPES, **TASK_SHAPES}.items()
        if other != task and any(all(key in record for key in shape.required) for shape in theirs)
    ]
    hint = f"; --task {' or '.join(others)} takes such records" if others else ""
    raise CheckpointError(
        f"{place}: has keys {keys}, and the task {task} needs one of: {_words(shapes)}{hint}; or map keys with --field"
    )
