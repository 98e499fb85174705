"""Tests of the tokens of spans: positions against the characters of each token, bytes against positions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qlora_lite.data.chat.token_spans import BYTE_OF_LETTER, TokenBytes, ranges_by_bytes, ranges_by_positions

END = "<e>"
TEXTS = ["abab ab. é", "a\n\nb  b", "Été 12 ¡¡ab"]
LETTERS = st.text("ab .\n1éÉ\u0301\U0001f600▁Ġ", min_size=1, max_size=12)


def byte_level(*, prefix: bool = False, trim: bool | None = None, digits: bool = False, nfc: bool = False) -> Tokenizer:
    core = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    core.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]) if digits else byte_level
    )
    core.decoder = decoders.ByteLevel()
    if nfc:
        core.normalizer = normalizers.NFC()
    if trim is not None:
        core.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(TEXTS * 3, trainer)
    return core


def with_added(left: bool, right: bool) -> Tokenizer:
    """Byte-level, with an added token that takes the white space around it."""
    core = byte_level()
    core.add_tokens([AddedToken("ab.", lstrip=left, rstrip=right)])
    return core


def metaspace() -> Tokenizer:
    core = Tokenizer(models.BPE(unk_token="?u"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(special_tokens=["?u", END], show_progress=False))
    return core


def word_pieces() -> Tokenizer:
    core = Tokenizer(models.WordPiece(unk_token="?u"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.train_from_iterator(TEXTS * 3, trainers.WordPieceTrainer(special_tokens=["?u", END], show_progress=False))
    return core


SPELLING: dict[str, Callable[[], Tokenizer]] = {
    "GPT-2": byte_level,
    "Llama 3, which trims": lambda: byte_level(trim=True),
    "Qwen": lambda: byte_level(trim=False, nfc=True),
    "SmolLM2": lambda: byte_level(digits=True),
}
MADE = {
    name: make()
    for name, make in {
        **SPELLING,
        "prefix space": lambda: byte_level(prefix=True),
        "left": lambda: with_added(True, False),
        "right": lambda: with_added(False, True),
        "metaspace": metaspace,
        "word pieces": word_pieces,
    }.items()
}
BYTES = {name: TokenBytes(core) for name, core in MADE.items()}


def spans_within(data: st.DataObject, text: str) -> list[tuple[int, int]]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    return [(start, stop) for start, stop in zip(cuts[::2], cuts[1::2], strict=False) if start < stop]


@given(text=LETTERS, data=st.data())
@settings(max_examples=150, deadline=None)
def test_positions_give_the_tokens_of_the_characters(text: str, data: st.DataObject) -> None:
    """A byte-level tokenizer: several tokens for one character, and a token for several characters."""
    spans = spans_within(data, text)
    encoding = MADE["GPT-2"].encode(text)
    found = ranges_by_positions(encoding, text, spans)
    learned = {token for start, stop in found for token in range(start, stop)}
    expected = {
        token
        for token, (first, last) in enumerate(encoding.offsets)
        if any(first < stop and last > start for start, stop in spans)
    }
    assert learned == expected
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(found))


@pytest.mark.parametrize("name", MADE)
@given(text=LETTERS, data=st.data())
@settings(max_examples=100, deadline=None)
def test_bytes_give_the_same_tokens_or_none(name: str, text: str, data: st.DataObject) -> None:
    spans = spans_within(data, text)
    encoding = MADE[name].encode(text)
    assert MADE[name].encode_batch_fast([text])[0].ids == encoding.ids
    found = ranges_by_bytes(encoding.ids, text, spans, BYTES[name])
    assert found is None or found == ranges_by_positions(encoding, text, spans)


def turns(texts: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    text, spans = "", []
    for part in texts:
        text += END
        spans.append((len(text), len(text) + len(part) + len(END)))
        text += part + END
    return text, spans


@pytest.mark.parametrize("name", SPELLING)
def test_bytes_give_the_tokens_of_turns_between_special_tokens(name: str) -> None:
    text, spans = turns(["ab", "Été 12", "a\n\nb \U0001f600", " b "])
    encoding = MADE[name].encode(text)
    found = ranges_by_bytes(encoding.ids, text, spans, BYTES[name])
    assert found == ranges_by_positions(encoding, text, spans)
    assert found is not None and [encoding.ids[last - 1] for _, last in found] == [0] * 4


@pytest.mark.parametrize(
    ("name", "text", "span"),
    [
        ("metaspace", "a b", (0, 1)),  # the first token is that of a space which the text has not
        ("word pieces", "AB", (0, 2)),
        ("right", "ab. b", (0, 3)),
        ("GPT-2", "abab", (1, 2)),  # within a token
        ("GPT-2", "\U0001f600 a", (0, 2)),  # the last space stands in the token behind it
        ("Llama 3, which trims", "a  ", (0, 3)),
        ("Llama 3, which trims", " 1", (0, 2)),
    ],
)
def test_what_bytes_do_not_tell_is_none(name: str, text: str, span: tuple[int, int]) -> None:
    assert ranges_by_bytes(MADE[name].encode(text).ids, text, [span], BYTES[name]) is None


def test_every_byte_has_its_letter() -> None:
    letters = pre_tokenizers.ByteLevel.alphabet()
    assert set(BYTE_OF_LETTER) == set(letters) and sorted(BYTE_OF_LETTER.values()) == list(range(256))
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    every = "".join(chr(code) for code in (*range(0x800), 0xFFFF, 0x1F600, 0x10FFFF))
    ((written, _),) = split.pre_tokenize_str(every)
    assert bytes(BYTE_OF_LETTER[letter] for letter in written) == every.encode()
