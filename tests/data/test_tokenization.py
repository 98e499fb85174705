"""Tests of labels against the assistant mask of transformers, and of chat templates and truncation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.data import tokenization
from qlora_lite.data.encoding import Encoder, TokenizedExample
from qlora_lite.data.tokenization import DataConfig, NothingToLearn, tokenize, tokenize_all, tokenize_sources
from qlora_lite.errors import CheckpointError, ConfigError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}" + CHATML
)
LINES = [
    "the cat sat on the mat\n\n",
    "  what is the answer\n to that? \n",
    "user\nassistant\nsystem\nBe kind",
    "\n\n\n",
]


def tokenizer_with(template: str | None, eos: str | None = "<|im_end|>") -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(LINES * 3, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, additional_special_tokens=special)
    wrapped.chat_template = template
    return wrapped


CHAT = tokenizer_with(CHATML)
PLAIN = tokenizer_with(None)


def learned_text(example: TokenizedExample, tokenizer: Any) -> str:
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (token, IGNORE_INDEX)
    return str(tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX]))


def conversation(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


CONTENT = st.text(alphabet="aet \n?é", max_size=8) | st.sampled_from(["the cat", "\n\nthe", "that? \n"])
EXCHANGES = st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4)


@pytest.mark.parametrize("tokenizer", [CHAT, tokenizer_with(DEFAULT_SYSTEM)], ids=["chatml", "default system"])
@given(exchanges=EXCHANGES, last=st.none() | CONTENT)
@settings(max_examples=60, deadline=None)
def test_labels_are_those_of_transformers_assistant_mask(
    tokenizer: Any, exchanges: list[tuple[str, str]], last: str | None
) -> None:
    turns = [turn for said, answer in exchanges for turn in (("user", said), ("assistant", answer))]
    record = conversation(*turns, *([("user", last)] if last is not None else []))
    trusted = tokenizer.apply_chat_template(record["messages"], return_dict=True, return_assistant_tokens_mask=True)
    ours = tokenize(record, tokenizer)
    assert ours.input_ids == trusted["input_ids"]
    kept = zip(trusted["input_ids"], trusted["assistant_masks"], strict=True)
    assert ours.labels == [token if mask else IGNORE_INDEX for token, mask in kept]


def test_every_turn_ends_with_the_token_to_stop_at() -> None:
    record = conversation(
        ("system", "x"), ("user", "what"), ("assistant", "the cat"), ("user", "?"), ("assistant", "a")
    )
    assert learned_text(tokenize(record, CHAT), CHAT) == "the cat<|im_end|>a<|im_end|>"
    assert tokenize(record, CHAT, learn="all").labels == tokenize(record, CHAT).input_ids


@pytest.mark.parametrize(
    ("record", "asked", "asked_plain"),
    [
        ({"prompt": "what is ", "completion": "that?"}, "what is ", "what is "),
        ({"prompt": "what is", "completion": "that?"}, "what is", "what is"),
        ({"instruction": "what is", "output": "that?"}, "what is", "what is\n\n"),
        ({"instruction": "what is", "input": "", "output": "that?"}, "what is", "what is\n\n"),
        ({"instruction": "what", "input": "is", "output": "that?"}, "what\n\nis", "what\n\nis\n\n"),
    ],
)
def test_pairs_become_a_conversation_or_plain_text(record: dict[str, str], asked: str, asked_plain: str) -> None:
    chat = tokenize(record, CHAT)
    assert chat == tokenize(conversation(("user", asked), ("assistant", "that?")), CHAT)
    plain = tokenize(record, PLAIN)
    assert PLAIN.decode(plain.input_ids) == asked_plain + "that?<|im_end|>"
    assert learned_text(plain, PLAIN) == "that?<|im_end|>"
    prompt_alone = PLAIN(asked_plain)["input_ids"]
    assert plain.input_ids[: len(prompt_alone)] == prompt_alone, "generation would begin after other tokens"
    whole = tokenize(record, PLAIN, learn="all")
    assert whole.labels == whole.input_ids == plain.input_ids


@pytest.mark.parametrize("tokenizer", [CHAT, PLAIN], ids=["with template", "without"])
def test_text_is_learned_whole_and_closed_once(tokenizer: Any) -> None:
    example = tokenize({"text": "the cat"}, tokenizer)
    assert example.labels == example.input_ids
    assert tokenizer.decode(example.input_ids) == "the cat<|im_end|>"
    assert tokenize({"text": "the cat<|im_end|>"}, tokenizer) == example


def test_a_template_that_closes_no_turn_is_closed_with_eos() -> None:
    bare = tokenizer_with("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}")
    assert learned_text(tokenize(conversation(("user", "what"), ("assistant", "that")), bare), bare).endswith(
        "<|im_end|>"
    )


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (
            "{{ messages[-1]['content'] }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
            r"writes messages\[1\].content in the prompt too",
        ),
        ("{{ raise_exception('only one turn') }}", "refuses roles user, assistant, user, assistant.*only one turn"),
        ("{{ messages[7]['content'] }}", "the chat template refuses"),
        (None, "this tokenizer has no chat template"),
    ],
)
def test_a_template_that_cannot_be_used_is_named(template: str | None, says: str) -> None:
    record = conversation(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    with pytest.raises(CheckpointError, match=says) as caught:
        tokenize_all([{"text": "x y"}, record], tokenizer_with(template))
    assert str(caught.value).startswith("record 2: ")


def test_plain_text_needs_an_end_token() -> None:
    with pytest.raises(CheckpointError, match="no end-of-sequence token"):
        tokenize({"text": "a"}, tokenizer_with(None, eos=None))


def test_truncation_is_counted_and_loses_nothing_silently() -> None:
    short = {"prompt": "a", "completion": "t"}
    long_answer = {"prompt": "a", "completion": "t" * 50}
    long_prompt = {"prompt": "a?" * 50, "completion": "t"}
    found = tokenize_all([short, long_answer, long_prompt], PLAIN, max_length=10)
    assert (len(found.examples), found.truncated, found.dropped) == (2, 1, 1)
    whole = tokenize(long_answer, PLAIN)
    assert found.examples[1] == TokenizedExample(whole.input_ids[:10], whole.labels[:10])
    with pytest.raises(CheckpointError, match="1 records without a token to learn within max_length 10"):
        tokenize(long_prompt, PLAIN, max_length=10)
    with pytest.raises(CheckpointError, match="got no records"):
        tokenize_all([], PLAIN)
    with pytest.raises(CheckpointError, match="without a token to learn"):
        tokenize(conversation(("user", "only a question")), CHAT)
    with pytest.raises(ConfigError, match="max_length must be None or at least 2; got 1"):
        tokenize(short, PLAIN, max_length=1)


def test_a_wrong_record_is_named_by_its_number() -> None:
    with pytest.raises(CheckpointError, match="record 2: text must be a string, got int 3"):
        tokenize_all([{"text": "a b"}, {"text": 3}], PLAIN)


def test_a_prompt_alone_is_what_a_model_is_asked_and_nothing_of_it_is_learned() -> None:
    for tokenizer, asked in ((CHAT, "<|im_start|>user\nhow?<|im_end|>\n<|im_start|>assistant\n"), (PLAIN, "how?")):
        found = tokenize_all([{"prompt": "how?"}], tokenizer, prompts_too=True)
        assert tokenizer.decode(found.examples[0].input_ids) == asked and found.dropped == 0
        assert set(found.examples[0].labels) == {IGNORE_INDEX}
    with pytest.raises(CheckpointError, match="unknown shape with keys prompt"):
        tokenize_all([{"prompt": "how?"}], CHAT)
    with pytest.raises(CheckpointError, match="record 1: the text has no tokens; got ''"):
        tokenize_all([{"prompt": ""}], PLAIN, prompts_too=True)


def test_what_is_cut_to_its_question_stays_where_nothing_has_to_be_learned() -> None:
    record = {"prompt": "what is the answer", "completion": "this"}
    assert tokenize_all([record], CHAT, 4, prompts_too=True).examples[0].learned_tokens == 0
    with pytest.raises(CheckpointError, match="nothing to train on in records: got 1 records without a token to learn"):
        tokenize_all([record], CHAT, 4)


def test_sources_are_read_in_the_order_of_their_lines(tmp_path: Path) -> None:
    """Several chunks, some ahead in another thread: with bad records, splits and tokens among them."""
    records: list[dict[str, Any]] = []
    for n in range(75):
        records += [{"prompt": f"what {n}", "completion": "that"}, {"text": f"the {n}"}, {"text": n}]
        records.append({"input_ids": [n, n], "labels": [n, n]})
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    config = DataConfig(skip_bad=100)
    seen: list[int] = []
    found = tokenize_sources([path], CHAT, config, cache=False, show=seen.append)
    good = [record for record in records if not isinstance(record.get("text"), int)]
    kept = [tokenize_all([record], CHAT, prompts_too=True).examples[0] for record in good]
    whole = tokenize_sources([path], CHAT, DataConfig(skip_bad=100, prompts_too=True), cache=False)
    assert list(whole.examples) == kept
    assert found.skipped == 75 and found.parts[0].found.records == 300
    assert seen == sorted(seen) and seen


def test_few_long_records_are_tokenized_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encodings of a call are in memory together, so long texts come a few at a time."""
    sizes: list[int] = []
    tokens = Encoder.tokens

    def noted(encoder: Encoder, drafts: Any) -> Any:
        sizes.append(len(drafts))
        return tokens(encoder, drafts)

    monkeypatch.setattr(Encoder, "tokens", noted)
    monkeypatch.setattr(tokenization, "CHUNK_CHARACTERS", 1000)
    monkeypatch.setattr(tokenization, "CHUNK_RECORDS", 8)
    records = [{"text": f"the {n}"} for n in range(20)] + [{"text": f"{n} " + "mat " * 150} for n in range(5)]
    found = tokenize_all(records, PLAIN)
    assert sizes == [8, 8, 6, 2, 1]
    monkeypatch.undo()
    assert list(found.examples) == list(tokenize_all(records, PLAIN).examples)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_length": 1}, "max_length must be None or at least 2; got 1"),
        ({"limit": 0}, "limit must be None or at least 1; got 0"),
        ({"skip_bad": -1}, "skip_bad must be an integer of at least 0; got -1"),
        ({"fields": {"answer": "x"}}, "fields must name keys of the shapes"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DataConfig(**settings)


def test_what_was_found_comes_with_the_error_that_nothing_is_left() -> None:
    with pytest.raises(
        NothingToLearn, match="nothing to train on in records: got 2 bad records and no other;"
    ) as found:
        tokenize_all([{"a": 1}, {"text": 2}], PLAIN, 8, skip_bad=2)
    (part,) = found.value.parts
    assert [place for place, _ in part.bad.kept] == ["record 1", "record 2"] and part.found.records == 2
    with pytest.raises(NothingToLearn, match="in records: got no records; give"):
        tokenize_all([], PLAIN, 8)
