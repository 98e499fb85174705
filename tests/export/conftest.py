"""Checkpoints with tokenizers that llama.cpp can read, and GGUF files as the `gguf` package reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

TEXTS = ["The cat sat on the mat, didn't it?", "x = 12345 + y\n\n  return 'ab'", "Ünïcödé wörds and 3 more words"] * 3
SPECIAL = ["<|end|>", "<|user|>"]
TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"


def byte_level(digits: bool = False) -> Any:
    """A tokenizer of bytes and some merges, as GPT-2's; with single digits, as SmolLM's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(True)] if digits else []
    core.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", chat_template=TEMPLATE)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_level(digits=True)


@pytest.fixture(scope="session")
def tokenizer_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a tokenizer, and a config to go with it."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("tokenizer")
    LlamaConfig(vocab_size=304).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_model(small_model: Callable[..., Any], tokenizer_folder: Path) -> Callable[..., Any]:
    """Returns a small model of a config class, with random vectors, that says it came from the tokenizer's folder."""

    def made(family: str, **sizes: Any) -> Any:
        model = small_model(family, **{"vocab_size": 304, "eos_token_id": 0, "bos_token_id": 0, **sizes})
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, std=0.3)
        model.config._name_or_path = str(tokenizer_folder)
        return model

    return made


@pytest.fixture(scope="session")
def fields() -> Callable[[Path], dict[str, Any]]:
    """Returns the settings of a file by their keys."""

    def read(path: Path) -> dict[str, Any]:
        return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}

    return read


@pytest.fixture(scope="session")
def values() -> Callable[[Path], dict[str, torch.Tensor]]:
    """Returns the unpacked tensors of a file by their names."""

    def read(path: Path) -> dict[str, torch.Tensor]:
        return {
            tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            for tensor in gguf.GGUFReader(path).tensors
        }

    return read
