"""Tests of tokenizers as settings: transformers' reader gives the same tokens, and what llama.cpp lacks is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_lite.errors import CheckpointError
from qlora_lite.export.gguf.library import write_gguf
from qlora_lite.export.gguf.tokenizer import PRE_TOKENIZERS, pre_tokenizer_name, tokenizer_settings

TEXTS = ["The cat, didn't it?  x = 12345", "<|user|>hé🚀llo<|end|>\n\n next", "  three   words "]
CONFIG = SimpleNamespace(bos_token_id=1, eos_token_id=0, unk_token_id=None, pad_token_id=None)


def read_back(folder: Path, settings: dict[str, Any], architecture: str = "llama") -> Any:
    """The tokenizer that transformers makes of a file with these settings."""
    from transformers import AutoTokenizer

    folder.mkdir(exist_ok=True)
    write_gguf(folder / "a.gguf", architecture, {"name": "a", **settings}, [])
    return AutoTokenizer.from_pretrained(folder, gguf_file="a.gguf")


def test_bytes_and_merges_are_read_back(tokenizer: Any, tokenizer_folder: Path, tmp_path: Path) -> None:
    settings = tokenizer_settings(tokenizer_folder, CONFIG, 304)
    assert settings["tokenizer_model"] == "gpt2" and settings["tokenizer_pre"] == "smollm"
    assert settings["token_list"][300:] == [f"[PAD{number}]" for number in range(300, 304)]
    assert settings["token_types"] == [3, 3, *[1] * 298, *[5] * 4]
    assert (settings["bos_token_id"], settings["eos_token_id"]) == (1, 0)
    assert not settings["add_bos_token"] and not settings["add_eos_token"]
    read = read_back(tmp_path / "out", settings)
    for text in TEXTS:
        assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert read.chat_template == tokenizer.chat_template


def test_sentencepiece_is_read_back(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaTokenizer

    letters = ["▁", *"abcdehloT"]
    joined = ["he", "ll", "▁a", "hell", "hello", "▁▁"]
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{value:02X}>" for value in range(256)], *letters, *joined]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [("h", "e"), ("l", "l"), ("▁", "a"), ("he", "ll"), ("hell", "o"), ("▁", "▁")]
    theirs = LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    theirs.add_tokens(["<user>"])
    theirs.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=280).save_pretrained(tmp_path)
    settings = tokenizer_settings(tmp_path, CONFIG, 280)
    assert (settings["tokenizer_model"], settings["tokenizer_pre"]) == ("llama", "default")
    assert settings["add_space_prefix"] and settings["add_bos_token"] and not settings["add_eos_token"]
    kinds = dict(zip(settings["token_list"], settings["token_types"], strict=True))
    assert (kinds["<s>"], kinds["<0x41>"], kinds["hello"], kinds["<user>"], kinds["[PAD279]"]) == (3, 6, 1, 4, 5)
    read = read_back(tmp_path / "out", settings)
    for text in ["hello a  ab", "Té <user> hell"]:
        assert read(text)["input_ids"] == theirs(text)["input_ids"]


def test_expressions_are_those_of_transformers() -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    for name, known in PRE_TOKENIZERS.items():
        if not known.ends_with_gpt2:
            assert known.splits == (GGUF_PRE_TOKENIZER_SPLITS[name],), name


def parts(pre: list[dict[str, Any]], ignore_merges: bool = False, normalizer: str | None = None) -> dict[str, Any]:
    return {
        "model": {"ignore_merges": ignore_merges},
        "normalizer": normalizer and {"type": normalizer},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre},
    }


def test_names_of_pre_tokenizers() -> None:
    def last(use_regex: bool) -> dict[str, Any]:
        return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}

    def split(expression: str) -> dict[str, Any]:
        return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}

    def name(*given: Any, **more: Any) -> str:
        return pre_tokenizer_name(Path("model"), parts(*given, **more))

    for known in ("llama-bpe", "tekken", "qwen2", "gpt-4o"):
        expression = PRE_TOKENIZERS[known].splits[0]
        assert name([split(expression), last(False)], PRE_TOKENIZERS[known].ignore_merges) == known
    qwen = split(PRE_TOKENIZERS["qwen2"].splits[0])
    assert name([qwen, last(False)], normalizer="NFC") == "qwen2"
    assert name([last(True)]) == "gpt-2"
    assert name([{"type": "Digits", "individual_digits": True}, last(True)]) == "smollm"
    with pytest.raises(
        CheckpointError, match=r"no name for \(\\w\+; ignore_merges False\); known are gpt-2, smollm, qw"
    ):
        name([split(r"\w+"), last(False)])
    for wrong in ({"ignore_merges": True}, {"normalizer": "NFKC"}):
        with pytest.raises(CheckpointError, match=r"splits text in a way that llama\.cpp has no name for"):
            name([qwen, last(False)], **wrong)
    with pytest.raises(CheckpointError, match="does not end with bytes, or adds a space"):
        name([{"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}])


def test_other_models_and_sizes_are_refused(tokenizer_folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"its model is WordLevel, and llama\.cpp reads BPE"):
        tokenizer_settings(tiny_folder, CONFIG, 200)
    with pytest.raises(CheckpointError, match="it has 300 tokens and the model 200 rows"):
        tokenizer_settings(tokenizer_folder, CONFIG, 200)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="has no tokenizer that transformers can load"):
        tokenizer_settings(tmp_path, CONFIG, 200)


def test_several_templates_keep_their_names(tokenizer: Any, tokenizer_folder: Path, fields: Callable[..., Any]) -> None:
    from qlora_lite.export.gguf.tokenizer import _template

    assert _template({"default": "a", "tools": "b"}) == [
        {"name": "default", "template": "a"},
        {"name": "tools", "template": "b"},
    ]
    assert _template(None) is _template("") is None
