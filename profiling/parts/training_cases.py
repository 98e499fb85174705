"""Training set-ups over small random models of several architectures, and the differences between two reports."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qlora_lite import LoraConfig, QuantConfig, TrainConfig
from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.report import MemoryReport

LARGE_SHARE = 0.01  # of the peak: a category of at least this share is compared with its own bytes

LLAMA_LIKE = {
    "vocab_size": 2000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "gpt2": {"vocab_size": 2000, "n_embd": 256, "n_layer": 4, "n_head": 8, "n_positions": 512},
    "qwen2": {**LLAMA_LIKE, "num_key_value_heads": 2},
    "gemma": {**LLAMA_LIKE, "num_key_value_heads": 1, "head_dim": 32},
    "mixtral": {**LLAMA_LIKE, "num_hidden_layers": 3, "num_local_experts": 4},
    "opt": {
        "vocab_size": 2000,
        "hidden_size": 256,
        "ffn_dim": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "word_embed_proj_dim": 256,
    },
}


@dataclass(frozen=True)
class Case:
    """A set-up of our training: a name of ARCHITECTURES or `smollm2`, and settings."""

    model: str
    quant: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    rank: int = 16
    rows: int = 2
    tokens: int = 256

    def __str__(self) -> str:
        settings = [f"{value}" for value in (*self.quant.values(), *self.train.values())]
        return " ".join([self.model, *settings, f"r{self.rank}", f"{self.rows}x{self.tokens}"])

    def arguments(self) -> tuple[QuantConfig, LoraConfig, TrainConfig]:
        return (
            QuantConfig(**self.quant),
            LoraConfig(rank=self.rank, alpha=2 * self.rank),
            TrainConfig(steps=2, **self.train),
        )


NONE = {"checkpointing": "none"}
BYTES, FEWER_BYTES = {"checkpointing": 27 << 20}, {"checkpointing": 12 << 20}
EIGHT_BIT = {"optimizer": "adamw8bit"}
INT8_EMBEDDING = {"format": "nf4", "embedding_format": "int8"}
CASES = (
    Case("smollm2", tokens=512),
    Case("smollm2", {"format": "int8"}, NONE, rows=1, tokens=256),
    Case("smollm2", INT8_EMBEDDING, {"checkpointing": 200 << 20}, rank=8, tokens=256),
    *(Case(name) for name in ARCHITECTURES),
    *(Case(name, {"format": "int8"}, NONE, rank=8, rows=3, tokens=128) for name in ARCHITECTURES),
    *(Case(name, {"format": "fp4"}, BYTES, rank=4) for name in ("gpt2", "mixtral")),
    *(Case(name, {"format": "fp4"}, FEWER_BYTES, rank=4) for name in ("llama", "qwen2")),
    *(Case(name, INT8_EMBEDDING, EIGHT_BIT, rank=32, rows=1) for name in ("llama", "gpt2", "qwen2", "opt")),
    *(Case(name, {"format": "none"}, {**NONE, **EIGHT_BIT}, rows=4, tokens=64) for name in ("llama", "gemma", "opt")),
    Case("llama", {"double_quant": False}, {"gradient_accumulation": 2}, rows=1, tokens=384),
    Case("mixtral", {"format": "none"}, tokens=64),
    Case("llama", {"format": "int8", "int8_activations": True}, tokens=512, rows=4),
)
TINY_CASES = (Case("llama", tokens=16), Case("gpt2", {"format": "int8"}, NONE, tokens=16))


def make_model(name: str, folder: Path, layers: int | None = None) -> Path:
    """Returns the folder of an architecture's checkpoint with random weights, and makes it if missing."""
    from transformers import AutoConfig, AutoModelForCausalLM

    target = folder / name
    if target.is_dir():
        return target
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = AutoConfig.for_model(name, **ARCHITECTURES[name])
    if layers is not None:
        config.num_hidden_layers = layers
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(target)
    return target


@dataclass(frozen=True)
class Difference:
    """The errors of a rehearsed phase against the measured one, as shares."""

    phase: str
    rehearsed: int
    measured: int
    worst_category: float
    other: float

    @property
    def error(self) -> float:
        """The signed error of the peak: above 0 if the rehearsal is higher."""
        return self.rehearsed / self.measured - 1


def differences(rehearsed: MemoryReport, measured: MemoryReport) -> Iterator[Difference]:
    """Yields the difference of each phase that both reports have, at its peaks."""
    for phase in measured.phases:
        found = rehearsed.phase(phase.name)
        if found is None:
            continue
        assert found.live_peak is not None and found.breakdown is not None
        assert phase.live_peak is not None and phase.breakdown is not None
        ours, theirs = found.breakdown.by_category(), phase.breakdown.by_category()
        off = 0.0
        for category, size in theirs.items():
            large = size >= LARGE_SHARE * phase.live_peak
            off = max(off, abs(ours[category] - size) / (size if large else phase.live_peak))
        other = theirs[Category.OTHER] / phase.live_peak
        yield Difference(phase.name, found.live_peak, phase.live_peak, off, other)
