"""Every chat template that trl ships, with conversations of every kind: what is learned is the answers and their ends.

A template may refuse a conversation only if it cannot write it: in every form it raises, or leaves out text of the
author. Anything else that is learned must hold every answer whole, its end, and nothing else.
"""

from __future__ import annotations

import collections
import datetime
import importlib.util
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.data.chat.jinja import depends_on_date, with_generation_marks
from qlora_lite.data.chat.marks import without_marks
from qlora_lite.data.chat.template import ChatTemplate, Form, forms_for
from qlora_lite.data.chat.turns import EMPTY_REASONING
from qlora_lite.data.encoding import Encoder, TokenizedExample, special_tokens
from qlora_lite.data.records import check_record
from qlora_lite.errors import CheckpointError

SPECIAL = re.compile(
    r"<[|｜][^<>{}'\"]{1,40}?[|｜]>|<(?:start|end)_of_(?:turn|utterance)>|</?s>|<turn\|>|<\|turn>|\[/?INST\]|\[gMASK\]|<sop>"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "A city."}},
            "required": ["city"],
        },
    },
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(arguments: object, number: int = 1) -> dict[str, Any]:
    return {"type": "function", "id": f"c{number}", "function": {"name": "get_weather", "arguments": arguments}}


def result(text: str, number: int = 1) -> dict[str, Any]:
    return {"role": "tool", "name": "get_weather", "tool_call_id": f"c{number}", "content": text}


def turns(*texts: str) -> list[dict[str, Any]]:
    return [(answer if index % 2 else user)(text) for index, text in enumerate(texts)]


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": turns("Hi there", "Hello you."),
    "two turns": turns("Hi there", "Hello you.", "And then?", "Nothing more."),
    "four turns": turns("q one", "r one x", "q two", "r two y", "q three", "r three z", "q four", "r four w"),
    "system": [{"role": "system", "content": "Be brief."}, *turns("Hi there", "Hello you.")],
    "thinking in one turn": [user("Hi"), answer("Hello you.", reasoning_content="I should greet.")],
    "thinking in all turns": [
        user("Hi"),
        answer("Hello you.", reasoning_content="I should greet."),
        user("More?"),
        answer("No more.", reasoning_content="Refuse politely."),
    ],
    "thinking in the content": [user("Hi"), answer("<think>\nI should greet.\n</think>\n\nHello you.")],
    "call, arguments as object": [
        user("Weather?"),
        answer(None, tool_calls=[call({"city": "Paris", "days": 3})]),
        result("rainy"),
        answer("It pours."),
    ],
    "call, arguments as text": [
        user("Weather?"),
        answer(None, tool_calls=[call('{"city": "Paris"}')]),
        result("rainy"),
        answer("It pours."),
    ],
    "two calls in a turn": [
        user("Weather?"),
        answer(None, tool_calls=[call({"city": "Paris"}), call({"city": "Rome"}, 2)]),
        result("rainy"),
        result("sunny", 2),
        answer("Wet there, dry here."),
    ],
    "text before a call": [
        user("Weather?"),
        answer("Let me see.", tool_calls=[call({"city": "Paris"})]),
        result("rainy"),
        answer("It pours."),
        user("And Rome?"),
        answer(None, tool_calls=[call({"city": "Rome"}, 2)]),
        result("sunny", 2),
        answer("Bright."),
    ],
    "null columns": [
        {**user("Hi there"), "tool_calls": None, "reasoning_content": None, "name": None},
        answer("Hello you.", tool_calls=None, reasoning_content=None),
    ],
    "answer repeats its question": turns("Say hello", "Say hello"),
    "answer is a prefix of another": turns("Count", "one", "Again", "one two"),
    "emoji and right-to-left": turns("שלום 👋🏽", "مرحبا 🌍 é"),
}


def templates() -> dict[str, str]:
    specification = importlib.util.find_spec("trl")
    assert specification is not None and specification.origin is not None
    folder = Path(specification.origin).parent / "chat_templates"
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}


TEMPLATES = templates()
ROW = re.compile(r"\| ([a-z][\w,\- ]+) \| (\d+) \| (\d+) (?=\|)")
# What the tests below found: templates that learn each conversation, and those that were tried.
LEARNED: collections.Counter[str] = collections.Counter()
TRIED: set[str] = set()


def byte_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A token for each byte, and one for everything in the template that looks like a special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = sorted({"<s>", "</s>", *SPECIAL.findall(template)})
    core = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=template
    )


def learned_runs(example: TokenizedExample, tokenizer: Any) -> Iterator[str]:
    """The text of each run of learned tokens."""
    run: list[int] = []
    for token, label in zip([*example.input_ids, -1], [*example.labels, IGNORE_INDEX], strict=True):
        if label != IGNORE_INDEX:
            run.append(token)
        elif run:
            yield tokenizer.decode(run)
            run = []


def author_texts(message: dict[str, Any]) -> list[str]:
    """What has to be in the text for a message."""
    texts = [part.strip() for part in re.split(r"</?think>", message.get("content") or "")]
    texts.append(message.get("reasoning_content") or "")
    for made in message.get("tool_calls") or ():
        arguments = made["function"]["arguments"]
        values = json.loads(arguments) if isinstance(arguments, str) else arguments
        texts += [made["function"]["name"], *map(str, values), *map(str, values.values())]
    return [text for text in texts if text]


def can_be_written(messages: list[dict[str, Any]], tools: list[Any] | None, tokenizer: Any) -> bool:
    """Whether some form of the conversation, and of its beginnings up to each answer, is written with all its texts."""
    given = {"tools": tools} if tools else {}

    def written(part: list[dict[str, Any]], form: Any) -> str:
        messages = [form.of({key: value for key, value in message.items() if value is not None}) for message in part]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **given))

    for form in forms_for(messages):
        try:
            for index, message in enumerate(messages):
                if message["role"] == "assistant":
                    text = written(messages[: index + 1], form)
                    if not all(part in text for part in author_texts(message)) or "None" in text:
                        raise LookupError
            whole = written(messages, form)
        except Exception:  # a template raises what it likes
            continue
        if all(
            part in whole for message in messages if message["role"] != "assistant" for part in author_texts(message)
        ):
            return True
    return False


def check_learned(messages: list[dict[str, Any]], examples: list[TokenizedExample], tokenizer: Any) -> None:
    answers = [message for message in messages if message["role"] == "assistant"]
    others = [text for message in messages if message["role"] != "assistant" for text in author_texts(message)]
    runs = [run for example in examples for run in learned_runs(example, tokenizer)]
    assert len(runs) == len(answers), runs
    plain = tokenizer.apply_chat_template
    for message, run in zip(answers, runs, strict=True):
        for text in author_texts(message):
            assert text in run, (text, run)
        for text in others:
            assert text not in run or any(text in part for part in author_texts(message)), (text, run)
        if not message.get("tool_calls"):
            content = author_texts({"content": message["content"]})[-1]
            end = run[run.rindex(content) + len(content) :].strip()
            assert end and SPECIAL.search(end), f"no end is learned behind {run!r}"
        try:
            asked = plain([user("a")], tokenize=False, add_generation_prompt=True)
            prompt = asked.removeprefix(plain([user("a")], tokenize=False))
        except Exception:
            continue
        assert not (prompt.strip() and run.startswith(prompt)), (prompt, run)
        assert not re.match(r"\s*<think>\s*</think>", run), run


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_are_learned_whole_with_their_ends_and_nothing_else(name: str) -> None:
    tokenizer = byte_tokenizer(TEMPLATES[name])
    encoder = Encoder(tokenizer)
    outcome: collections.Counter[str] = collections.Counter()
    for title, messages in CONVERSATIONS.items():
        tools = [TOOL] if any(message.get("tool_calls") for message in messages) else None
        record = {"messages": messages, **({"tools": tools} if tools else {})}
        try:
            drafts = encoder.drafts(check_record(record))
        except CheckpointError as error:
            said = str(error)
            if not said.startswith("the chat template ") or can_be_written(messages, tools, tokenizer):
                pytest.fail(f"{title}: {said}")
            outcome["refused"] += 1
            continue
        assert isinstance(drafts, list)
        examples = [marked.example() for marked in encoder.tokens(drafts)]
        check_learned(messages, examples, tokenizer)
        if tools:
            assert all("get_weather" in tokenizer.decode(example.input_ids) for example in examples)
        outcome["learned"] += 1
        LEARNED[title] += 1
    assert outcome["learned"] >= 4, outcome
    TRIED.add(name)


def test_readme_has_the_table() -> None:
    """Runs behind the tests of all templates, which one process runs in this order."""
    if set(TEMPLATES) != TRIED:
        pytest.skip("needs the tests of all templates in the same process")
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    rows = {title: (int(learned), int(refused)) for title, learned, refused in ROW.findall(readme)}
    assert rows == {title: (LEARNED[title], len(TEMPLATES) - LEARNED[title]) for title in CONVERSATIONS}


def learned_parts(template: ChatTemplate, messages: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """The index and the learned text of each answer."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    texts = template.learned(messages, answers, {})
    return [
        (index, text.text[start:stop])
        for text in texts
        for index, (start, stop) in zip(text.answers, text.spans, strict=True)
    ]


GENERATION = [name for name, source in TEMPLATES.items() if with_generation_marks(source)]


def test_templates_that_say_what_is_generated_are_known() -> None:
    assert len(GENERATION) >= 30 and {name for name in TEMPLATES if name.endswith("_training")} <= {*GENERATION}


@pytest.mark.parametrize("name", GENERATION)
def test_what_a_template_says_is_generated_is_found_as_transformers_finds_it(name: str) -> None:
    tokenizer = byte_tokenizer(TEMPLATES[name])
    marked = with_generation_marks(TEMPLATES[name])
    compared = 0
    # transformers forgets the last bytes of a last character.
    conversations = [messages for title, messages in CONVERSATIONS.items() if not title.startswith("emoji")]
    for messages, form in itertools.product(conversations, (Form(), Form(content="parts"))):
        tools = [TOOL] if any(message.get("tool_calls") for message in messages) else None
        written = [form.of(message) for message in messages]
        try:
            expected = tokenizer.apply_chat_template(
                written, tools, return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception:  # a template raises what it likes
            continue
        plain = str(tokenizer.apply_chat_template(written, tools, tokenize=False))
        found = without_marks(str(tokenizer.apply_chat_template(written, tools, chat_template=marked, tokenize=False)))
        assert found.text == plain
        offsets = tokenizer(plain, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        got = [int(any(start <= first < stop for start, stop in found.generated)) for first, _ in offsets]
        assert got == expected["assistant_masks"]
        compared += any(got)
    assert compared >= 4


@pytest.mark.parametrize("name", GENERATION)
def test_tags_around_whole_answers_change_nothing(name: str) -> None:
    """trl's training templates mark whole answers, and some of them forget the end of the turn."""
    source = re.sub(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}", r"{%\1 if true \2%}{% endif %}", TEMPLATES[name])
    with_tags, without = (byte_tokenizer(text) for text in (TEMPLATES[name], source))
    for title in ("two turns", "thinking in one turn", "system"):
        try:
            expected = learned_parts(ChatTemplate(without), CONVERSATIONS[title])
        except CheckpointError:
            continue
        assert learned_parts(ChatTemplate(with_tags), CONVERSATIONS[title]) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_user_cannot_write_an_answer(name: str) -> None:
    """Special tokens and whole turns inside of a question change nothing of what is learned."""
    tokenizer = byte_tokenizer(TEMPLATES[name])
    template, encoder = ChatTemplate(tokenizer, special_tokens(tokenizer)), Encoder(tokenizer)

    def runs(messages: list[dict[str, Any]]) -> list[str]:
        drafts = encoder.drafts(check_record({"messages": messages}))
        assert isinstance(drafts, list)
        return [run for marked in encoder.tokens(drafts) for run in learned_runs(marked.example(), tokenizer)]

    messages = turns("Hi there", "Hello you.", "More?", "No.")
    (answered,) = [text.text for text in template.learned(messages[:2], [1], {})]
    turn = answered[answered.index("Hi there") + len("Hi there") :].replace("Hello you.", "I am evil.")
    expected = [part for _, part in learned_parts(template, messages)]
    everything = " ".join(special_tokens(tokenizer))
    for text in (f"x{turn}", f"{turn}{turn}x", everything, "<think>\n\n</think>\n\n", "Hello you.", f"x{answered}"):
        asked = [{**message, "content": text} if message["role"] == "user" else message for message in messages]
        for one in (template, ChatTemplate(tokenizer, special_tokens(tokenizer))):
            assert [part for _, part in learned_parts(one, asked)] == expected, text
        assert runs(asked) == runs(messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_added_block_of_reasoning_is_learned_on_request(name: str) -> None:
    tokenizer = byte_tokenizer(TEMPLATES[name])
    messages = turns("Hi there", "Hello you.")
    (got,) = [part for _, part in learned_parts(ChatTemplate(tokenizer, learn_empty_reasoning=True), messages)]
    (without,) = [part for _, part in learned_parts(ChatTemplate(tokenizer), messages)]
    prompt = ChatTemplate(tokenizer).prompt(messages[:1], {})
    (whole,) = [text.text for text in ChatTemplate(tokenizer).learned(messages, [1], {})]
    assert got.endswith(without)
    if whole.startswith(prompt):
        assert got == whole[len(prompt) :].rstrip()
    if got != without:
        (added,) = EMPTY_REASONING.finditer(whole)
        assert whole[added.end() :].rstrip() == without and whole.index(got) < added.end()


def test_templates_that_write_the_date_are_known() -> None:
    dated = {name for name, source in TEMPLATES.items() if depends_on_date(source)}
    assert dated == {"gptoss", "gptoss_training", "llama3_2", "muse_glimmer", "muse_glimmer_training"}
    days = [datetime.date(2024, 2, 29), datetime.date(1999, 12, 31)]
    for name, source in TEMPLATES.items():
        one, other = (ChatTemplate(byte_tokenizer(source), date=day) for day in days)
        texts = [template.learned(CONVERSATIONS["one turn"], [1], {})[0].text for template in (one, other)]
        assert (texts[0] != texts[1]) is (name in dated)
        assert ("2024" in texts[0] and "1999" in texts[1]) or name not in dated
        prompts = [template.prompt(CONVERSATIONS["one turn"][:1], {}) for template in (one, other)]
        assert (prompts[0] != prompts[1]) is (name in dated)
