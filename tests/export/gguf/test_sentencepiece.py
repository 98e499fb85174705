"""Tests of SentencePiece's BPE: a joiner written as llama.cpp's gives the tokens that tokenizers gives."""

from __future__ import annotations

import itertools
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from qlora_lite.errors import CheckpointError
from qlora_lite.export.gguf.sentencepiece import (
    MODEL_FILE,
    UNJOINED,
    missing_merge,
    ranks_of_tokens,
    read_pieces,
    sentencepiece_scores,
    space_prefix,
)

BYTES = [f"<0x{value:02X}>" for value in range(256)]
LETTERS = ["▁", *"abcd"]
JOINED = ["ab", "cd", "abc", "bc", "▁a", "▁ab", "abcd", "▁▁"]


def merges_of(tokens: list[str], joined: list[str]) -> list[list[str]]:
    """All pairs of each token, in the tokens' order, as transformers makes them of a SentencePiece model."""
    return [[token[:end], token[end:]] for token in joined for end in range(1, len(token)) if
            token[:end] in tokens and token[end:] in tokens]  # fmt: skip


TOKENS = ["<unk>", "</s>", *BYTES, *LETTERS, *JOINED]
MODEL: dict[str, Any] = {
    "vocab": {token: number for number, token in enumerate(TOKENS)},
    "merges": merges_of(TOKENS, JOINED),
    "byte_fallback": True,
}


def joined_as_llama_cpp(text: str, scores: list[float]) -> list[int]:
    """Joins the two neighbours whose union has the highest score, the first of several, until none is a token."""
    vocabulary, pieces = MODEL["vocab"], list(text)
    while True:
        pairs = [
            (-scores[vocabulary[left + right]], place)
            for place, (left, right) in enumerate(itertools.pairwise(pieces))
            if left + right in vocabulary
        ]
        if not pairs:
            break
        _, place = min(pairs)
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    return [number for piece in pieces for number in ([vocabulary[piece]] if piece in vocabulary else
            [vocabulary[f"<0x{byte:02X}>"] for byte in piece.encode()])]  # fmt: skip


def test_scores_join_texts_as_merges_do(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    merges = [tuple(merge) for merge in MODEL["merges"]]
    core = Tokenizer(models.BPE(MODEL["vocab"], merges, byte_fallback=True))
    scores = sentencepiece_scores(tmp_path, MODEL, {"<unk>", "</s>"}, len(TOKENS) + 3)
    assert isinstance(scores, list) and len(scores) == len(TOKENS) + 3
    chance = random.Random(0)
    for _ in range(300):
        text = "".join(chance.choices([*LETTERS, "é"], k=chance.randrange(1, 12)))
        assert joined_as_llama_cpp(text, scores) == core.encode(text).ids, text


def test_merges_that_scores_cannot_say_are_refused(tmp_path: Path) -> None:
    torn = [["a", "b"], ["ab", "c"], ["b", "c"], ["a", "bc"]]
    tokens = ["a", "b", "c", "ab", "bc", "abc"]
    assert "its merges to 'abc' are at several places" in str(ranks_of_tokens([tuple(merge) for merge in torn]))
    lacking = [("a", "b"), ("b", "c"), ("ab", "c")]
    assert "does not merge 'a' with 'bc', where llama.cpp would" in missing_merge(tokens, lacking)
    found = sentencepiece_scores(tmp_path, {**MODEL, "merges": torn}, set(), len(TOKENS))
    assert isinstance(found, str) and MODEL_FILE in found
    assert sentencepiece_scores(tmp_path, {**MODEL, "byte_fallback": False}, set(), 9) == (
        "it has no tokens for single bytes, which llama.cpp falls back to"
    )


def test_mixed_merges_of_spaces_have_one_rank() -> None:
    """As in Mistral's vocabulary, whose runs of spaces have one score, so that their merges are sorted by length."""
    spaces = [("▁" * left, "▁" * right) for left in (3, 2, 1) for right in (3, 2, 1) if left + right <= 4]
    found = ranks_of_tokens([("a", "b"), *spaces, ("b", "a")])
    assert found == {"ab": 0, "▁▁▁▁": 1, "▁▁▁": 1, "▁▁": 1, "ba": 1 + len(spaces)}
    assert "at several places" in str(ranks_of_tokens([*spaces, ("a", "b"), *spaces]))
    in_order = [("▁", "▁"), ("▁▁", "▁▁")]
    assert ranks_of_tokens(in_order) == {"▁▁": 0, "▁▁▁▁": 1}


def field(number: int, content: bytes | int | float) -> bytes:
    """A field of a message of protocol buffers."""
    if isinstance(content, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", content)
    value = content if isinstance(content, int) else len(content)
    size = b""
    while value >= 0x80:
        size, value = size + bytes([value & 0x7F | 0x80]), value >> 7
    size += bytes([value])
    return bytes([number << 3]) + size if isinstance(content, int) else bytes([number << 3 | 2]) + size + content


def proto(pieces: list[str], kind: int = 2) -> bytes:
    written = b"".join(
        field(1, field(1, text.encode()) + field(2, -float(n)) + field(3, 1)) for n, text in enumerate(pieces)
    )
    return written + field(2, field(1, b"input") + field(3, kind) + field(4, 70000)) + field(3, b"")


def test_scores_of_a_tokenizer_model_come_first(tmp_path: Path) -> None:
    (tmp_path / MODEL_FILE).write_bytes(proto([*TOKENS[:-1], "other"]))
    assert read_pieces(tmp_path / MODEL_FILE)[:2] == [("<unk>", 0.0), ("</s>", -1.0)]
    scores = sentencepiece_scores(tmp_path, {**MODEL, "merges": []}, set(), len(TOKENS))
    assert isinstance(scores, list)
    assert scores[:-1] == [-float(number) for number in range(len(TOKENS) - 1)] and scores[-1] == UNJOINED
    (tmp_path / MODEL_FILE).write_bytes(proto(["x"] * 10))
    assert "has other tokens" in str(sentencepiece_scores(tmp_path, MODEL, set(), len(TOKENS)))


@pytest.mark.parametrize("content", [b"", b"\x0a\xff\xff\xff\xff\x7f", b"\x07", proto(["a"])[:4], b"\x0a\x02\x08\x01"])
def test_damaged_models_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MODEL_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=MODEL_FILE):
        read_pieces(tmp_path / MODEL_FILE)


def test_a_unigram_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / MODEL_FILE).write_bytes(proto(["a"], kind=1))
    with pytest.raises(CheckpointError, match="is not a BPE model of SentencePiece"):
        read_pieces(tmp_path / MODEL_FILE)


def test_spaces() -> None:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    assert space_prefix([prepend, replace], []) == ("", True)  # Llama 2
    assert space_prefix([replace], [split]) == ("", False)  # Gemma
    assert space_prefix([], [metaspace]) == ("", True)
    assert space_prefix([], [{**metaspace, "prepend_scheme": "never"}]) == ("", False)
    assert "NFKC" in space_prefix([{"type": "NFKC"}, replace], [])[0]
    assert "leaves spaces as they are" in space_prefix([], [])[0]
