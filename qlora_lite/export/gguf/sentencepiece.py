"""SentencePiece's BPE as llama.cpp has it: the pair of pieces whose union has the highest score is joined first.

The scores are those of `tokenizer.model`, a message of Google's protocol buffers, read here without further packages.
Without that file they come from the merges of `tokenizer.json`, if both ways of joining then give the same tokens.
"""

from __future__ import annotations

import itertools
import struct
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_lite.checkpoints.files import open_regular
from qlora_lite.errors import CheckpointError

MODEL_FILE = "tokenizer.model"
LARGEST_MODEL = 64 << 20
SPACE = "▁"
# Scores of tokens that no pair is joined to (llama.cpp's converter).
UNJOINED, UNUSED = -1000.0, -10000.0
# Fields of sentencepiece_model.proto: ModelProto.pieces and .trainer_spec, SentencePiece.piece and .score, and
# TrainerSpec.model_type with its value for BPE.
PIECES, TRAINER, TEXT, SCORE, MODEL_TYPE, BPE = 1, 2, 1, 2, 3, 2
VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5


def space_prefix(
    normalizers: Sequence[Mapping[str, Any]], pre_tokenizers: Sequence[Mapping[str, Any]]
) -> tuple[str, bool]:
    """Returns what llama.cpp cannot do of these steps, empty if it can, and whether a space is put before a text."""
    replaces, prefix = False, False
    for step in (*normalizers, *pre_tokenizers):
        kind, pattern = step["type"], dict(step.get("pattern") or {})
        if kind == "Prepend" and step["prepend"] == SPACE:
            prefix = True
        elif kind == "Replace" and pattern == {"String": " "} and step["content"] == SPACE:
            replaces = True
        elif kind == "Metaspace" and step["replacement"] == SPACE:
            replaces, prefix = True, prefix or step["prepend_scheme"] != "never"
        elif kind != "Split" or pattern != {"String": " "} or not replaces:  # none is left to split at
            return f"it has a step {kind} that llama.cpp lacks", False
    return ("" if replaces else f"it leaves spaces as they are, where llama.cpp writes {SPACE}"), prefix


def sentencepiece_scores(
    folder: Path, model: Mapping[str, Any], added: Collection[str], rows: int
) -> list[float] | str:
    """Returns the score of each token, or why llama.cpp would give other tokens.

    model: of the tokenizer.json. added: its tokens that no text is joined to.
    """
    vocabulary: Mapping[str, int] = model["vocab"]
    lacking = [f"<0x{value:02X}>" for value in range(256) if f"<0x{value:02X}>" not in vocabulary]
    if lacking or not model["byte_fallback"]:
        return "it has no tokens for single bytes, which llama.cpp falls back to"
    pieces = read_pieces(folder / MODEL_FILE) if (folder / MODEL_FILE).is_file() else None
    scores = [UNUSED] * rows
    for number in vocabulary.values():
        scores[number] = UNJOINED
    if pieces is not None:
        known = [(number, text, score) for number, (text, score) in enumerate(pieces) if vocabulary.get(text) == number]
        if len(known) * 2 < len(pieces):
            return f"its {MODEL_FILE} has other tokens than its tokenizer.json"
        for number, _, score in known:
            scores[number] = score
        return scores
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    ranks = ranks_of_tokens(merges)
    problem = ranks if isinstance(ranks, str) else missing_merge([t for t in vocabulary if t not in added], merges)
    if isinstance(ranks, str) or problem:
        return f"without a {MODEL_FILE} {problem}"
    for token, rank in ranks.items():
        scores[vocabulary[token]] = float(-rank)
    return scores


def ranks_of_tokens(merges: Sequence[tuple[str, ...]]) -> dict[str, int] | str:
    """Returns the rank of each token by its merges, or why tokens have none.

    Merges to the same token have to follow one another. Runs of spaces may be mixed, as they are where SentencePiece
    gives them one score: then they have one rank, and in both programs the first run of a text grows from its left.
    """
    ranks: dict[str, int] = {}
    for is_space, block in itertools.groupby(enumerate(merges), lambda merge: not set("".join(merge[1])) - {SPACE}):
        joined = [(rank, left + right) for rank, (left, right) in block]
        changes = [token for token, _ in itertools.groupby(token for _, token in joined)]
        tied = is_space and len(set(changes)) < len(changes)
        counts, first = Counter(changes), {token: rank for rank, token in reversed(joined)}
        again = [token for token in changes if token in ranks or (not tied and counts[token] > 1)]
        if again:
            return f"its merges to {again[0]!r} are at several places, which scores cannot say"
        ranks |= {token: joined[0][0] if tied else rank for token, rank in first.items()}
    return ranks


def missing_merge(tokens: Sequence[str], merges: Sequence[tuple[str, ...]]) -> str:
    """Returns which pair llama.cpp would join and the merges do not; empty if there is none."""
    listed, known = set(merges), set(tokens)
    for token in tokens:
        for end in range(1, len(token)):
            pair = token[:end], token[end:]
            if pair not in listed and pair[0] in known and pair[1] in known:
                return f"it does not merge {pair[0]!r} with {pair[1]!r}, where llama.cpp would"
    return ""


def read_pieces(path: Path) -> list[tuple[str, float]]:
    """Reads text and score of each piece. Raises CheckpointError for a damaged file, and for another model than BPE."""
    with open_regular(path, "a model of SentencePiece", LARGEST_MODEL) as file:
        content = file.read()
    pieces, kind = [], 1
    try:
        for field, value in _fields(content):
            if field == PIECES:
                found = dict(_fields(value))
                pieces.append((found[TEXT].decode(), struct.unpack("<f", found.get(SCORE, b"\0\0\0\0"))[0]))
            elif field == TRAINER:
                kind = dict(_fields(value)).get(MODEL_TYPE, kind)
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, struct.error) as error:
        raise CheckpointError(
            f"{path} cannot be read as a model of SentencePiece; fetch the checkpoint again"
        ) from error
    if kind != BPE or not pieces:
        raise CheckpointError(f"{path} is not a BPE model of SentencePiece, which is the one that llama.cpp has")
    return pieces


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yields (number, value) of the fields of a message; values are integers, or bytes that are not decoded."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        field, kind = tag >> 3, tag & 7
        if kind == VARINT:
            value, place = _varint(message, place)
            yield field, value
            continue
        if kind == BYTES:
            size, place = _varint(message, place)
        else:
            size = {EIGHT_BYTES: 8, FOUR_BYTES: 4}[kind]
        if place + size > len(message):
            raise ValueError("a field ends after the message")
        yield field, message[place : place + size]
        place += size


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """Returns the integer that begins at a place, and the place after it."""
    value = shift = 0
    while True:
        byte = message[place]
        value, shift, place = value | (byte & 0x7F) << shift, shift + 7, place + 1
        if byte < 0x80:
            return value, place
