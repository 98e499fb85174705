"""The tokenizer as settings of a GGUF file: tokens, their types, merges or scores, special tokens, chat template.

llama.cpp does not read `tokenizer.json`. It has its own byte-level BPE, which splits text as one of the pre-tokenizers
that it knows by name, and its own form of SentencePiece's BPE (sentencepiece.py). What neither can do is refused:
llama.cpp would give other tokens than the model was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_lite.checkpoints.hub import load_tokenizer
from qlora_lite.errors import CheckpointError
from qlora_lite.export.gguf.library import Settings
from qlora_lite.export.gguf.sentencepiece import sentencepiece_scores, space_prefix

# llama.cpp's types of tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
DIGITS = "digits"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_WITH_SLASH = _REST.replace(r"[\r\n]*|", r"[\r\n/]*|", 1)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = tuple(rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{first}{_LOWER}{second}" for first, second in (("*", "+"), ("+", "*")))


@dataclass(frozen=True)
class PreTokenizer:
    """How a pre-tokenizer of llama.cpp splits text (src/llama-vocab.cpp).

    splits: expressions before the step to bytes, or `DIGITS`. ends_with_gpt2: whether GPT-2's expression comes last.
    ignore_merges: whether a whole word of the vocabulary is one token whatever the merges say. normalizer: one of
    transformers that llama.cpp leaves out in the models that it knows under this name.
    """

    splits: tuple[str, ...]
    ends_with_gpt2: bool = False
    ignore_merges: bool = False
    normalizer: str | None = None


PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer((), ends_with_gpt2=True),
    "smollm": PreTokenizer((DIGITS,), ends_with_gpt2=True),
    "qwen2": PreTokenizer((rf"{_CONTRACTIONS}{_WORDS}|\p{{N}}{_REST}",), normalizer="NFC"),
    "llama-bpe": PreTokenizer((rf"{_CONTRACTIONS}{_WORDS}|\p{{N}}{{1,3}}{_REST}",), ignore_merges=True),
    "tekken": PreTokenizer((rf"{'|'.join(_CASED)}|\p{{N}}{_REST_WITH_SLASH}",), ignore_merges=True),
    "gpt-4o": PreTokenizer(
        (rf"{'|'.join(part + _CONTRACTIONS + '?' for part in _CASED)}|\p{{N}}{{1,3}}{_REST_WITH_SLASH}",)
    ),
}


def cannot_be_told(folder: Path, problem: str) -> CheckpointError:
    """Returns the error for a tokenizer that llama.cpp does not have."""
    return CheckpointError(f"the tokenizer of {folder} cannot be written to a GGUF file: {problem}")


def tokenizer_settings(folder: Path, config: Any, rows: int) -> Settings:
    """Returns the settings of a checkpoint's tokenizer. rows: those of the model's embedding.

    Raises CheckpointError if there is no tokenizer, if llama.cpp cannot do what it does, or for more tokens than rows.
    """
    tokenizer = load_tokenizer(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise cannot_be_told(folder, "it has no tokenizer.json, and transformers made none of its files")
    parts: dict[str, Any] = json.loads(backend.to_str())
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if max(vocabulary.values()) >= rows:
        raise cannot_be_told(folder, f"it has {max(vocabulary.values()) + 1} tokens and the model {rows} rows")
    model = parts["model"]
    if model["type"] != "BPE":
        raise cannot_be_told(folder, f"its model is {model['type']}, and llama.cpp reads BPE")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise cannot_be_told(folder, f"it has {key} {model[key]!r}")
    added = dict(tokenizer.added_tokens_decoder)
    settings = _byte_level(folder, parts) if _is_byte_level(parts) else _sentencepiece(folder, parts, added, rows)
    tokens, types = _tokens(vocabulary, added, rows, settings["tokenizer_model"] == "llama")
    settings |= {"token_list": tokens, "token_types": types, **_special_tokens(tokenizer, config)}
    if template := _template(tokenizer.chat_template):
        settings["chat_template"] = template
    return settings


def _flat(part: Mapping[str, Any] | None, key: str) -> Iterator[Mapping[str, Any]]:
    """Yields the steps of a normalizer or pre-tokenizer; key: of those in a sequence."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for step in part[key]:
        yield from _flat(step, key)


def pre_tokenizer_steps(parts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the steps of a tokenizer.json's pre-tokenizer."""
    return list(_flat(parts["pre_tokenizer"], "pretokenizers"))


def normalizer_steps(parts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the steps of a tokenizer.json's normalizer."""
    return list(_flat(parts["normalizer"], "normalizers"))


def _is_byte_level(parts: Mapping[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in pre_tokenizer_steps(parts))


def _byte_level(folder: Path, parts: Mapping[str, Any]) -> Settings:
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in parts["model"]["merges"]]
    return {"tokenizer_model": "gpt2", "tokenizer_pre": pre_tokenizer_name(folder, parts), "token_merges": merges}


def pre_tokenizer_name(folder: Path, parts: Mapping[str, Any]) -> str:
    """Returns llama.cpp's name of a byte-level pre-tokenizer. Raises CheckpointError if it has none."""
    *splits, last = pre_tokenizer_steps(parts)
    normalizers = [step["type"] for step in normalizer_steps(parts)]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise cannot_be_told(folder, "its pre-tokenizer does not end with bytes, or adds a space")
    found = PreTokenizer(tuple(_split(step) for step in splits), last["use_regex"], parts["model"]["ignore_merges"])
    for name, known in PRE_TOKENIZERS.items():
        same = (known.splits, known.ends_with_gpt2, known.ignore_merges)
        if same == (found.splits, found.ends_with_gpt2, found.ignore_merges) and normalizers in (
            [],
            [known.normalizer],
        ):
            return name
    shown = ", ".join([*normalizers, *found.splits]) or "none"
    raise cannot_be_told(
        folder,
        f"it splits text in a way that llama.cpp has no name for ({shown}; ignore_merges {found.ignore_merges}); known "
        f"are {', '.join(PRE_TOKENIZERS)}",
    )


def _split(step: Mapping[str, Any]) -> str:
    """Returns a step as `PreTokenizer.splits` has it; a text that is none of these for another step."""
    if step["type"] == "Digits" and step["individual_digits"]:
        return DIGITS
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex", step["pattern"]))
    return f"{step['type']} {dict(step)}"


def _sentencepiece(folder: Path, parts: Mapping[str, Any], added: Mapping[int, Any], rows: int) -> Settings:
    problem, prefix = space_prefix(normalizer_steps(parts), pre_tokenizer_steps(parts))
    if problem:
        raise cannot_be_told(folder, problem)
    scores = sentencepiece_scores(folder, parts["model"], {token.content for token in added.values()}, rows)
    if isinstance(scores, str):
        raise cannot_be_told(folder, scores)
    return {
        "tokenizer_model": "llama",
        "tokenizer_pre": "default",
        "token_scores": scores,
        "add_space_prefix": prefix,
    }


def _tokens(
    vocabulary: Mapping[str, int], added: Mapping[int, Any], rows: int, has_bytes: bool
) -> tuple[list[str], list[int]]:
    """Returns the text and type of each token; rows that no token has are unused."""
    tokens, types = [f"[PAD{number}]" for number in range(rows)], [UNUSED] * rows
    for text, number in vocabulary.items():
        tokens[number], types[number] = text, NORMAL
        if has_bytes and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[number] = BYTE
    for number, token in added.items():
        is_control = token.special or _looks_special(token.content)
        # llama.cpp compares tokens that users defined with the text as it is.
        tokens[number] = token.content if is_control or not has_bytes else token.content.replace("▁", " ")
        types[number] = CONTROL if is_control else USER_DEFINED
    return tokens, types


def _looks_special(text: str) -> bool:
    """Whether a token marks a place in a template, though its checkpoint does not call it special (llama.cpp)."""
    return (text.startswith("<|") and text.endswith("|>")) or (text.startswith("<｜") and text.endswith("｜>"))


def _special_tokens(tokenizer: Any, config: Any) -> Settings:
    """Returns the ids of special tokens, and which of them are added to a text."""
    settings: Settings = {}
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id", None)
        number = getattr(config, f"{name}_token_id", None) if number is None else number
        if isinstance(number, int) and not isinstance(number, bool):
            settings[f"{name}_token_id"] = number
    ids: list[int] = tokenizer("a")["input_ids"]
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    before = ids[: len(ids) - len(bare)] if ids[len(ids) - len(bare) :] == bare else ids[:1]
    settings["add_bos_token"] = bool(before) and before[0] == settings.get("bos_token_id")
    settings["add_eos_token"] = (
        len(ids) > len(bare) and ids[-1] == settings.get("eos_token_id") and ids != before + bare
    )
    return settings


def _template(template: Any) -> str | list[dict[str, str]] | None:
    """Returns a tokenizer's chat template as the writer takes it: a text, or several with names."""
    if isinstance(template, Mapping):
        return [{"name": name, "template": text} for name, text in template.items()]
    return str(template) if template else None
