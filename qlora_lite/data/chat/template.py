"""A tokenizer's chat template: which form of a conversation it takes, what else it is given, and what it writes.

Templates expect different forms of the same conversation. The content of an answer that only calls tools is None, an
empty string or absent; the arguments of a call are an object or JSON text; a content is text or a list of parts; the
reasoning of an answer is a field of its own or stands in the content between `<think>` and `</think>`. The forms are
tried in turn until the template writes everything that the author wrote.
"""

from __future__ import annotations

import datetime
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from qlora_lite.data.chat.answers import Conversation, LearnedText
from qlora_lite.data.chat.jinja import depends_on_date, template_source, with_generation_marks
from qlora_lite.data.chat.marks import marks_in
from qlora_lite.data.chat.messages import ASSISTANT, REASONING_KEYS, Message
from qlora_lite.data.chat.turns import MOST_SHAPES, ChatTemplateError, KnownShapes, Writer
from qlora_lite.errors import CheckpointError, listing
from qlora_lite.patches import patched_template_date

THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL)
# Parameters of `apply_chat_template` that are not variables of a template.
NOT_VARIABLES = {
    *("conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    *("tokenizer_kwargs", "sanitize_control_tokens"),
}


class TemplatedTokenizer(Protocol):
    """The part of a transformers tokenizer that writes and knows special tokens."""

    chat_template: Any  # a string, or several by name

    def apply_chat_template(self, conversation: Sequence[Message], **options: Any) -> object: ...


@dataclass(frozen=True)
class Form:
    """One way to hand a conversation over."""

    reasoning: str = "as given"  # or "field", "content"
    content: str = "as given"  # or "text", "parts"
    missing: str = "none"  # or "text", "absent"
    arguments: str = "object"  # or "text"

    def of(self, message: Message) -> Message:
        """The message in this form."""
        is_text = isinstance(message.get("content"), str) and "tool_calls" not in message
        if is_text and self.reasoning == "as given" and self.content != "parts":
            return message
        changed = _with_reasoning(message, self.reasoning)
        content = changed.get("content")
        if content is None:
            changed.pop("content", None)
            if self.missing != "absent":
                changed["content"] = None if self.missing == "none" else ""
        elif self.content == "parts" and isinstance(content, str):
            changed["content"] = [{"type": "text", "text": content}]
        elif self.content == "text" and isinstance(content, list) and all(_is_text(part) for part in content):
            changed["content"] = "".join(str(part["text"]) for part in content)
        calls = changed.get("tool_calls")
        if isinstance(calls, list):
            changed["tool_calls"] = [self._call(call) for call in calls]
        return changed

    def _call(self, call: Mapping[str, Any]) -> dict[str, object]:
        arguments = call["function"].get("arguments")
        if self.arguments == "text" and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif self.arguments == "object" and isinstance(arguments, str):
            arguments = json.loads(arguments)
        return {**call, "function": {**call["function"], "arguments": arguments}}


def _is_text(part: object) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def _with_reasoning(message: Message, place: str) -> dict[str, object]:
    changed, content = dict(message), message.get("content")
    if message["role"] != ASSISTANT or place == "as given":
        return changed
    if place == "field" and isinstance(content, str) and (found := THOUGHT.fullmatch(content)):
        changed |= {"reasoning_content": found[1].strip("\n"), "content": found[2]}
    if place == "content" and isinstance(content, str | None):
        thought = next((changed.pop(key) for key in REASONING_KEYS if isinstance(changed.get(key), str)), None)
        if thought is not None:
            changed["content"] = f"<think>\n{thought}\n</think>\n\n{content or ''}"
    return changed


def forms_for(messages: Sequence[Message]) -> Iterator[Form]:
    """The forms that these messages can have, the given one first."""
    contents = [message.get("content") for message in messages]
    in_field = any(isinstance(message.get(key), str) for message in messages for key in REASONING_KEYS)
    in_content = any(isinstance(text, str) and THOUGHT.fullmatch(text) for text in contents)
    reasoning = ("as given", *("field",) * in_content, *("content",) * in_field)
    is_list = any(isinstance(content, list) for content in contents)
    missing = ("none", "text", "absent") if None in contents else ("none",)
    arguments = ("object", "text") if any(message.get("tool_calls") for message in messages) else ("object",)
    contents_in = ("as given", *("text",) * is_list, "parts")
    for reason, content in itertools.product(reasoning, contents_in):
        for absent, argument in itertools.product(missing, arguments):
            yield Form(reason, content, absent, argument)


@dataclass
class ChatTemplate:
    """The chat template of a tokenizer, and what conversations have shown of it so far.

    specials: the texts of the tokenizer's special tokens. date: what `strftime_now` writes, today by default, at
    midnight. learn_empty_reasoning: whether an empty block of reasoning is learned that the template adds behind the
    generation prompt.
    """

    tokenizer: TemplatedTokenizer
    specials: Sequence[str] = ()
    date: datetime.date | None = None
    learn_empty_reasoning: bool = False
    _known: KnownShapes = field(default_factory=KnownShapes, init=False)
    _taken: dict[object, Form] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        longest_first = sorted(map(re.escape, filter(None, self.specials)), key=len, reverse=True)
        self._special = re.compile("|".join(longest_first)) if longest_first else None
        sources = {has_tools: template_source(self.tokenizer.chat_template, has_tools) for has_tools in (False, True)}
        self._marked = {has_tools: with_generation_marks(source) for has_tools, source in sources.items()}
        # One date for all texts, also if the day ends in between.
        self._date = (self.date or datetime.date.today()) if self.depends_on_date else None

    @property
    def depends_on_date(self) -> bool:
        """Whether texts may hold the date, so that they differ from one day to another unless it is set."""
        return depends_on_date(self.tokenizer.chat_template)

    @property
    def date_written(self) -> datetime.date | None:
        """The date that the template writes; None if it writes none."""
        return self._date

    def special_at(self, text: str, position: int) -> int:
        """The length of the special token that begins at a position of a text, or 0."""
        found = self._special and self._special.match(text, position)
        return len(found[0]) if found else 0

    def write(self, messages: Sequence[Message], for_generation: bool, given: Mapping[str, object]) -> str:
        """The text of a conversation. given: tools, documents and other variables of the template.

        Raises CheckpointError with the template's own words if it refuses the conversation.
        """
        options = {"tokenize": False, "add_generation_prompt": for_generation, **given}
        try:
            if self._date is None:
                return str(self.tokenizer.apply_chat_template(list(messages), **options))
            with patched_template_date(self._date):
                return str(self.tokenizer.apply_chat_template(list(messages), **options))
        except Exception as error:  # a template is a program of the checkpoint's, and may raise anything
            roles = ", ".join(str(message["role"]) for message in messages)
            raise CheckpointError(
                f"the chat template refuses roles {roles} ({type(error).__name__}: {error}); "
                f"change the record to what it accepts"
            ) from error

    def learned(
        self, messages: Sequence[Message], answers: Iterable[int], given: Mapping[str, object]
    ) -> list[LearnedText]:
        """Texts in which each of these messages is learned as the model generates it.

        Raises ChatTemplateError, naming the fields, if the template leaves out text of the messages or the tools in
        every form, and CheckpointError if it refuses all forms.
        """
        chosen = list(answers)
        return self._tried(messages, given, lambda conversation: conversation.learned(chosen))

    def whole(self, messages: Sequence[Message], left_out: Iterable[int], given: Mapping[str, object]) -> LearnedText:
        """The text of a conversation, learned as a whole but for these answers. Raises as `learned`."""
        chosen = list(left_out)
        return self._tried(messages, given, lambda conversation: [conversation.whole(chosen)])[0]

    def prompt(self, messages: Sequence[Message], given: Mapping[str, object]) -> str:
        """The text behind which a model writes the next answer. Raises as `learned`."""
        return self._tried(messages, given, lambda conversation: [conversation.prompt()])[0].text

    def _tried(
        self,
        messages: Sequence[Message],
        given: Mapping[str, object],
        texts_of: Callable[[Conversation], list[LearnedText]],
    ) -> list[LearnedText]:
        """What the first form gives that the template writes whole."""
        if marks_in(messages):
            raise ChatTemplateError("messages hold characters of Unicode's private use, U+E000 to U+E01F; remove them")
        if wrong := sorted(NOT_VARIABLES & given.keys()):
            raise ChatTemplateError(f"{listing(wrong)} cannot be set for a chat template; leave it out")
        setting = _setting(given)
        structure = (setting, *(_structure(message) for message in messages[:8]))
        writer, errors = self._writer(given), []
        for form in self._forms(messages, structure):
            written = [form.of(message) for message in messages]
            try:
                found = texts_of(Conversation(written, writer, self._known, (form, setting)))
                _check_tools(found, given)
            except CheckpointError as error:
                errors.append(error)
                continue
            if len(self._taken) >= MOST_SHAPES:
                self._taken.clear()
            self._taken[structure] = form
            return found
        raise next((error for error in errors if isinstance(error, ChatTemplateError)), errors[0])

    def _forms(self, messages: Sequence[Message], structure: object) -> Iterator[Form]:
        """The form that messages of this structure took, and then the others."""
        known = self._taken.get(structure)
        if known is not None:
            yield known
        yield from (form for form in forms_for(messages) if form != known)

    def _writer(self, given: Mapping[str, object]) -> Writer:
        source = self._marked[given.get("tools") is not None]
        marked = {**given, "chat_template": source}
        return Writer(
            lambda messages, for_generation: self.write(messages, for_generation, given),
            self.special_at,
            (lambda messages, for_generation: self.write(messages, for_generation, marked)) if source else None,
            self.learn_empty_reasoning,
        )


def _setting(given: Mapping[str, object]) -> str:
    """What decides how a template writes answers, beside messages. Which tools there are does not."""
    if not given:
        return ""
    shown = {key: bool(value) if key in ("tools", "documents") else value for key, value in given.items()}
    return json.dumps(shown, sort_keys=True, default=str)


def _structure(message: Message) -> tuple[object, ...]:
    content = message.get("content")
    thinks = isinstance(content, str) and THOUGHT.fullmatch(content) is not None
    return (message["role"], type(content), thinks, *message)


def _check_tools(found: Sequence[LearnedText], given: Mapping[str, object]) -> None:
    tools = given.get("tools")
    for tool in tools if isinstance(tools, list) else ():
        name = str(tool.get("function", tool).get("name"))
        if any(name not in text.text for text in found):
            raise ChatTemplateError(f"the chat template leaves out the tool {name!r}")
