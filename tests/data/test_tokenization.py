"""Labels against transformers' own assistant mask, packing against the unpacked model, order against its seed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.data.batching import batches, epoch_order, pack
from qlora_lite.data.tokenization import TokenizedExample, tokenize, tokenize_all
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
    assert tokenize(record, CHAT, completion_only=False).labels == tokenize(record, CHAT).input_ids


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
    whole = tokenize(record, PLAIN, completion_only=False)
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
        ("{{ messages[-1]['content'] }}{% for m in messages %}{{ m['content'] }}{% endfor %}", "cannot be told apart"),
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
    with pytest.raises(CheckpointError, match="record 2: text must be a string, got NoneType None"):
        tokenize_all([{"text": "a b"}, {"text": None}], PLAIN)


def numbered(lengths: list[int]) -> list[TokenizedExample]:
    """Examples without a token in common, so that each token says where it came from."""
    starts = [1, *itertools.accumulate(lengths, initial=1)][1:]
    spans = [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=False)]
    return [TokenizedExample(span, [*span[:1], IGNORE_INDEX, *span[2:]] if len(span) > 2 else span) for span in spans]


@given(st.lists(st.integers(1, 12), max_size=600), st.integers(12, 30))
@settings(deadline=None)
def test_packing_puts_every_example_into_one_row_that_holds_it(lengths: list[int], max_length: int) -> None:
    rows = pack(lengths, max_length)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    totals = [sum(lengths[index] for index in row) for row in rows]
    assert all(0 < total <= max_length for total in totals)
    # First-fit leaves at most one row half empty, among those that are open together.
    assert sum(2 * total <= max_length for total in totals) <= 1 + len(rows) // 256


def test_packing_is_first_fit() -> None:
    assert pack([5, 4, 6, 3, 2, 1], 9) == [[0, 1], [2, 3], [4, 5]]
    assert pack([], 9) == []
    with pytest.raises(ConfigError, match="must hold the longest example; got '9 for 10 tokens'"):
        pack([10], 9)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(1, 5), st.integers(0, 99), st.booleans())
@settings(deadline=None)
def test_an_epoch_holds_every_token_once_with_its_label(
    lengths: list[int], batch_size: int, seed: int, packing: bool
) -> None:
    examples = numbered(lengths)
    label_of = {t: lab for e in examples for t, lab in zip(e.input_ids, (IGNORE_INDEX, *e.labels[1:]), strict=True)}
    limit = 12 if packing else None
    seen = []
    for batch in batches(examples, batch_size, seed, pad_token_id=0, epochs=1, packing=packing, max_length=limit):
        ids, labels = batch["input_ids"], batch["labels"]
        assert ids.dtype == labels.dtype == torch.int64
        assert ids.shape == labels.shape and ids.shape[0] <= batch_size and ids.shape[1] <= (limit or 9)
        tokens = ids != 0
        assert bool(tokens.any(0).all()), "a column of nothing but filling"
        assert bool((labels[~tokens] == IGNORE_INDEX).all())
        assert labels[tokens].tolist() == [label_of[token] for token in ids[tokens].tolist()]
        assert set(batch) == {"input_ids", "labels", "position_ids" if packing else "attention_mask"}
        if packing:
            first_tokens = torch.isin(ids, torch.tensor([example.input_ids[0] for example in examples]))
            assert bool((batch["position_ids"][first_tokens] == 0).all())
            assert int((batch["position_ids"][tokens] == 0).sum()) == int(first_tokens.sum())
        else:
            assert torch.equal(batch["attention_mask"], tokens.long())
        seen += ids[tokens].tolist()
    assert sorted(seen) == sorted(label_of)


def test_order_depends_on_seed_and_epoch_alone_and_never_ends() -> None:
    examples = numbered([3] * 10)

    def epochs(seed: int, count: int) -> list[list[int]]:
        drawn = itertools.islice(batches(examples, 5, seed, pad_token_id=0), 2 * count)
        flat = [token for batch in drawn for token in batch["input_ids"][:, 0].tolist()]
        return [flat[i : i + 10] for i in range(0, len(flat), 10)]

    assert epochs(3, 4) == epochs(3, 4)
    assert epochs(3, 4) != epochs(4, 4)
    assert len({tuple(order) for order in epochs(3, 4)}) == 4
    firsts = [example.input_ids[0] for example in examples]
    assert epochs(3, 4)[2] == [firsts[index] for index in epoch_order(10, seed=3, epoch=2)]
    assert epoch_order(5, 0, 0) == [1, 0, 3, 4, 2], "a stored run must find the same order again"


@pytest.mark.parametrize(
    ("settings_given", "says"),
    [
        ({"batch_size": 0}, "batch_size must be"),
        ({"seed": -1}, "seed must be"),
        ({"epochs": 0}, "epochs must be None"),
        ({"pad_token_id": None}, "pad_token_id must be a token id"),
        ({"packing": True}, "packing needs it"),
        ({"max_length": 4}, "must hold the longest example; tokenize with the same max_length; got '4 for 5 tokens'"),
        ({"examples": []}, "at least one example"),
    ],
)
def test_settings_are_refused_before_the_first_batch(settings_given: dict[str, Any], says: str) -> None:
    arguments: dict[str, Any] = {"examples": numbered([5]), "batch_size": 1, "seed": 0, "pad_token_id": 0}
    with pytest.raises(ConfigError, match=says):
        batches(**(arguments | settings_given))


def tiny_llama(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation=attention, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def label_losses(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    """The loss of every learned token, by the token; no two examples have one in common."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    places = (batch["labels"][:, 1:] != IGNORE_INDEX).nonzero().tolist()
    return {int(batch["input_ids"][row, column + 1]): losses[row, column] for row, column in places}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_packed_examples_have_the_losses_they_have_alone(attention: str, batch_size: int) -> None:
    model = tiny_llama(attention)
    examples = numbered([4, 9, 3, 7, 5, 2, 8, 6, 4, 7])
    alone: dict[int, torch.Tensor] = {}
    for batch in batches(examples, 1, 0, pad_token_id=0, epochs=1):
        alone |= label_losses(model, batch)
    packed: dict[int, torch.Tensor] = {}
    shapes = []
    for batch in batches(examples, batch_size, 0, pad_token_id=0, epochs=1, packing=True, max_length=20):
        packed |= label_losses(model, batch)
        shapes.append(batch["input_ids"].shape)
    assert len(alone) == sum(example.learned_tokens for example in examples)
    assert sum(rows for rows, _ in shapes) < len(examples), "nothing was packed"
    assert alone.keys() == packed.keys()
    for token, loss in alone.items():
        torch.testing.assert_close(packed[token], loss, rtol=1e-5, atol=1e-5)


def test_a_prompt_alone_is_what_a_model_is_asked_and_nothing_of_it_is_learned() -> None:
    for tokenizer, asked in ((CHAT, "<|im_start|>user\nhow?<|im_end|>\n<|im_start|>assistant\n"), (PLAIN, "how?")):
        found = tokenize_all([{"prompt": "how?"}], tokenizer, prompts_too=True)
        assert tokenizer.decode(found.examples[0].input_ids) == asked and found.dropped == 0
        assert set(found.examples[0].labels) == {IGNORE_INDEX}
    with pytest.raises(CheckpointError, match="unknown shape with keys prompt"):
        tokenize_all([{"prompt": "how?"}], CHAT)
    with pytest.raises(CheckpointError, match="record 1: the prompt has no tokens; got ''"):
        tokenize_all([{"prompt": ""}], PLAIN, prompts_too=True)


def test_what_is_cut_to_its_question_stays_where_nothing_has_to_be_learned() -> None:
    record = {"prompt": "what is the answer", "completion": "this"}
    assert tokenize_all([record], CHAT, 4, prompts_too=True).examples[0].learned_tokens == 0
    with pytest.raises(CheckpointError, match="nothing to train on: got 1 records without a token to learn"):
        tokenize_all([record], CHAT, 4)
