"""The shapes of a record: which keys it has, and what they mean.

    messages                           a conversation: [{"role": "user", "content": "..."}, ...]
    conversations                      the same as sharegpt writes it: [{"from": "human", "value": "..."}, ...]
    input_ids, labels                  tokens, with label -100 where nothing is learned
    prompt, completion                 text, or messages as trl has them
    instruction, input, output         text; input is optional
    text                               text that is learned whole

The first shape whose keys a record has is taken. A key that holds null counts as absent. Other keys are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from qlora_lite.checkpoints.files import excerpt
from qlora_lite.data.chat.messages import ASSISTANT, SWITCHES, check_text, checked_messages, without_nulls
from qlora_lite.data.images.image import COLUMNS, with_images
from qlora_lite.errors import CheckpointError, listing

Record = Mapping[str, object]

# The roles that sharegpt's data sets have. A function call is an answer.
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "assistant": ASSISTANT,
    "model": ASSISTANT,
    "bot": ASSISTANT,
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": ASSISTANT,
}
# What a chat template is given beside the messages.
TEMPLATE_KEYS = ("tools", "documents", "chat_template_kwargs")
HALF_AN_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Conversation:
    """Checked messages, and what the chat template is given beside them.

    prompt: the number of messages at the beginning that are a prompt, so that their answers are not learned.
    """

    messages: list[dict[str, object]]
    given: Mapping[str, object]
    prompt: int = 0


@dataclass(frozen=True)
class Exchange:
    """Text that answers text. Without a chat template: prompt, separator and completion, joined.

    completion: None where only the prompt is given. An empty prompt means that all text is learned.
    """

    prompt: str
    completion: str | None
    separator: str = ""
    system: str | None = None
    given: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Tokens:
    """Token ids, and whether each is learned."""

    input_ids: list[int]
    learned: list[bool]


Content = Conversation | Exchange | Tokens


@dataclass(frozen=True)
class Part:
    """A text that a model gets whole: plain text, two texts as the tokenizer joins them, words, or a conversation.

    ends: whether an end-of-sequence token closes a plain text. target: whether the decoder is to write it.
    """

    text: str = ""
    second: str | None = None
    words: tuple[str, ...] = ()
    conversation: Conversation | None = None
    ends: bool = False
    target: bool = False


@dataclass(frozen=True)
class Answered:
    """The texts of a record for another task than a causal language model's, and what is to be learned of them.

    answer: the label, the labels or the number, as JSON has it; None where the texts alone say it.
    """

    parts: tuple[Part, ...]
    answer: object = None


@dataclass(frozen=True)
class Shape:
    """A kind of record. required, optional: its keys. read: `(record, place)` -> what it contains, checked."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Record, str], Content | Answered]

    @property
    def in_words(self) -> str:
        """Its keys, as help texts and errors have them."""
        hidden = ("system", "attention_mask", *COLUMNS, *TEMPLATE_KEYS)
        shown = [key for key in self.optional if key not in hidden]
        return ", ".join([*self.required, *(f"{key} (optional)" for key in shown)])


def parsed_list(value: object, name: str, place: str) -> object:
    """A list that stands in a cell as JSON text, as in CSV files. Any other value is returned as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        wanted = f"{name} must be a list, or JSON text of one"
        raise CheckpointError(f"{place}: {wanted}, got {excerpt(value)}") from error


def _given(record: Record, place: str) -> dict[str, object]:
    """What the template is given beside messages: tools and documents (lists or JSON text) and its own variables."""
    given: dict[str, object] = {}
    for key in ("tools", "documents"):
        value = record.get(key)
        value = parsed_list(value, key, place) if not isinstance(value, str) or value.strip() else None
        if not value:
            continue
        if not isinstance(value, list) or not all(isinstance(part, Mapping) for part in value):
            raise CheckpointError(f"{place}: {key} must be a list of objects, got {excerpt(value)}")
        given[key] = without_nulls(value)
    options = record.get("chat_template_kwargs") or {}
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise CheckpointError(f"{place}: chat_template_kwargs must be an object, got {excerpt(options)}")
    return {**options, **given}


def _system(record: Record, place: str) -> str | None:
    system = record.get("system")
    if system is None or system == "":
        return None
    check_text(system, "system", place)
    return str(system)


def _with_system(messages: list[dict[str, object]], record: Record, place: str) -> list[dict[str, object]]:
    system = _system(record, place)
    if system is None:
        return messages
    if messages[0]["role"] == "system":
        raise CheckpointError(f"{place}: has a system message and a key system; remove one of them")
    return [{"role": "system", "content": system}, *messages]


def _read_messages(record: Record, place: str) -> Content:
    messages = checked_messages(parsed_list(record["messages"], "messages", place), place)
    messages = with_images(_with_system(messages, record, place), record, place)
    return Conversation(messages, _given(record, place))


def _message_of_turn(turn: object, number: int, place: str) -> dict[str, object]:
    """A message as OpenAI has it, of a turn as sharegpt has it."""
    name = f"conversations[{number}]"
    if isinstance(turn, Mapping) and turn.get("role") is not None and turn.get("from") is None:
        return dict(turn)
    if not isinstance(turn, Mapping) or not isinstance(turn.get("from"), str):
        raise CheckpointError(f"{place}: {name} must be {{from, value}}, got {excerpt(turn)}")
    said = str(turn["from"])
    if said not in ROLES:
        known = listing(sorted(ROLES), len(ROLES))
        raise CheckpointError(f"{place}: {name}.from must be one of {known}; got {excerpt(said)}")
    rest = {key: turn[key] for key in (*SWITCHES, "reasoning_content") if turn.get(key) is not None}
    if said != "function_call":
        return {"role": ROLES[said], "content": turn.get("value"), **rest}
    calls = parsed_list(turn.get("value"), f"{name}.value", place)
    calls = calls if isinstance(calls, list) else [calls]
    return {"role": ASSISTANT, "content": None, "tool_calls": calls, **rest}


def _read_conversations(record: Record, place: str) -> Content:
    turns = parsed_list(record["conversations"], "conversations", place)
    if not isinstance(turns, list) or not turns:
        wanted = "conversations must be a list of {from, value}, at least one"
        raise CheckpointError(f"{place}: {wanted}, got {type(turns).__name__} {excerpt(turns)}")
    messages = checked_messages([_message_of_turn(turn, number, place) for number, turn in enumerate(turns)], place)
    return Conversation(_with_system(messages, record, place), _given(record, place))


def _read_prompt_completion(record: Record, place: str) -> Content:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(record.get("label"), bool):
        raise CheckpointError(
            f"{place}: prompt, completion and a label of true or false are an unpaired preference, which trl's "
            f"KTOTrainer takes; to learn every completion, remove the label"
        )
    if isinstance(prompt, list):
        return _read_conversational(record, prompt, completion, place)
    check_text(prompt, "prompt", place)
    check_text(completion, "completion", place)
    return Exchange(str(prompt), str(completion), "", _system(record, place), _given(record, place))


def _read_conversational(record: Record, prompt: list[object], completion: object, place: str) -> Content:
    """trl's form: both are lists of messages, and of the prompt nothing is learned."""
    answers = [{"role": ASSISTANT, "content": completion}] if isinstance(completion, str) else completion
    if not isinstance(answers, list) or not answers:
        raise CheckpointError(f"{place}: completion must be a list of messages, as prompt is; got {excerpt(answers)}")
    messages = _with_system(checked_messages([*prompt, *answers], place), record, place)
    messages = with_images(messages, record, place)
    return Conversation(messages, _given(record, place), len(messages) - len(answers))


def _read_instruction(record: Record, place: str) -> Content:
    for key in ("instruction", "output"):
        check_text(record[key], key, place)
    if "input" in record:
        check_text(record["input"], "input", place)
    parts = (str(record["instruction"]), str(record.get("input", "")))
    prompt = "\n\n".join(part for part in parts if part)
    return Exchange(prompt, str(record["output"]), "\n\n", _system(record, place))


def _read_text(record: Record, place: str) -> Content:
    check_text(record["text"], "text", place)
    return Exchange("", str(record["text"]))


def _read_prompt(record: Record, place: str) -> Content:
    if isinstance(record["prompt"], list):
        messages = with_images(checked_messages(record["prompt"], place), record, place)
        return Conversation(messages, _given(record, place))
    check_text(record["prompt"], "prompt", place)
    return Exchange(str(record["prompt"]), None, "", _system(record, place), _given(record, place))


def _read_tokens(record: Record, place: str) -> Content:
    from qlora_lite.compute.cross_entropy import IGNORE_INDEX  # imports torch, and help texts import this file

    columns: dict[str, list[int]] = {}
    for key in ("input_ids", "labels", "attention_mask"):
        values = parsed_list(record.get(key), key, place)
        if key == "attention_mask" and values is None:
            values = [1] * len(columns["input_ids"])
        if not isinstance(values, list) or not all(type(value) is int for value in values):
            raise CheckpointError(f"{place}: {key} must be a list of integers, got {excerpt(values)}")
        columns[key] = values
    if len({len(values) for values in columns.values()}) > 1 or not columns["input_ids"]:
        got = listing(f"{len(values)} {key}" for key, values in columns.items())
        raise CheckpointError(f"{place}: input_ids and labels must be equally long, at least one token; got {got}")
    kept = [row for row in zip(*columns.values(), strict=True) if row[2]]  # the mask is 0 on padding
    for position, (token, label, _) in enumerate(kept):
        if label not in (token, IGNORE_INDEX) or not 0 <= token <= HALF_AN_INT32:
            wanted = f"a label must be its token or {IGNORE_INDEX}, not shifted"
            raise CheckpointError(f"{place}: {wanted}; got label {label} for token {token} at {position}")
    if not kept:
        raise CheckpointError(f"{place}: attention_mask leaves no token; give at least one")
    return Tokens([token for token, _, _ in kept], [label != IGNORE_INDEX for _, label, _ in kept])


SHAPES = (
    Shape("messages", ("messages",), ("system", *COLUMNS, *TEMPLATE_KEYS), _read_messages),
    Shape("conversations", ("conversations",), ("system", *TEMPLATE_KEYS), _read_conversations),
    Shape("tokens", ("input_ids", "labels"), ("attention_mask",), _read_tokens),
    Shape(
        "prompt and completion", ("prompt", "completion"), ("system", *COLUMNS, *TEMPLATE_KEYS), _read_prompt_completion
    ),
    Shape("instruction", ("instruction", "output"), ("input", "system"), _read_instruction),
    Shape("text", ("text",), (), _read_text),
)
PROMPT_ALONE = Shape("prompt", ("prompt",), ("system", *COLUMNS, *TEMPLATE_KEYS), _read_prompt)
SHAPES_IN_WORDS = " | ".join(shape.in_words for shape in SHAPES)
KEYS = tuple(dict.fromkeys(key for shape in SHAPES for key in (*shape.required, *shape.optional)))


def shape_of(record: Record, place: str, prompts_too: bool = False) -> Shape:
    """Returns the shape of a record. Raises CheckpointError, beginning with `place`, if it has none.

    prompts_too: also accept a prompt without a completion.
    """
    for shape in (*SHAPES, PROMPT_ALONE) if prompts_too else SHAPES:
        if all(key in record for key in shape.required):
            if shape.name == "text" and (key := next((key for key in ("label", "labels") if key in record), None)):
                raise CheckpointError(
                    f"{place}: has a text and its {key}, which --task sequence-classification learns; to learn the "
                    f"text itself, remove the key {key}"
                )
            return shape
    if record.get("chosen") is not None and record.get("rejected") is not None:
        raise CheckpointError(
            f"{place}: is a preference pair (chosen, rejected), of which --task sequence-classification learns a "
            f"reward, and trl's DPOTrainer a policy; to learn the chosen answers alone, map them: --field "
            f"completion=chosen, or --field messages=chosen for conversations"
        )
    if "tokens" in record and "labels" in record:
        raise CheckpointError(f"{place}: has words (tokens) and their labels, which --task token-classification learns")
    keys = ", ".join(sorted(map(str, record))) or "none"
    words = f"{SHAPES_IN_WORDS} | {PROMPT_ALONE.in_words}" if prompts_too else SHAPES_IN_WORDS
    raise CheckpointError(f"{place}: unknown shape with keys {keys}; use one of: {words}; or map keys with --field")


def unused_keys(record: Record, shape: Shape) -> Iterable[str]:
    """The keys of a record that its shape does not read."""
    return (key for key in record if key not in shape.required and key not in shape.optional)
