"""The cases of matrix.py: small models, ways to adapt them as options of peft and of LoraConfig, and known refusals.

A subject is a family x a variant x a choice of targets x a base. A case is a subject in one direction. Options that
LoraConfig lacks are found by its fields, and their cases are reported as not built yet.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qlora_lite import LoraConfig

RANK, ALPHA = 4, 12
TOKENS_TRAINED = (3, 5)
BASES = ("none", "int8", "nf4")
# from_peft: trained and saved by peft, loaded here. to_peft: the reverse. bf16: from_peft in bf16, both against fp32.
# merge: from_peft, then merged by both sides. files: saved, loaded and saved again, by us and by peft.
DIRECTIONS = ("from_peft", "to_peft", "bf16", "merge", "files")


@dataclass(frozen=True)
class Family:
    """A small model: its config class in transformers, and the names of its layers."""

    config: str
    sizes: dict[str, Any]
    attention: tuple[str, ...]
    embedding: str = "embed_tokens"
    norm: str = "norm"
    blocks: str = "layers"
    tied: bool = True
    biased: bool = False
    stacks: tuple[str, ...] = ()


# Without a padding token: its row would be zeros, for which peft's DoRA of a tied head gives 0 / 0.
COMMON = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": None, "initializer_range": 0.15}
LLAMA = {
    **COMMON,
    "hidden_size": 64,  # a multiple of the block size: bitsandbytes unpacks other rows wrongly on CPUs with AVX-512
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {**COMMON, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OPT = {**LLAMA, "ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0, "init_std": 0.15}
QKV = ("q_proj", "k_proj", "v_proj")
FAMILIES = {
    "llama": Family("LlamaConfig", {**LLAMA, "tie_word_embeddings": False}, (*QKV, "o_proj"), tied=False),
    "gpt2": Family(
        "GPT2Config", {**GPT2, **NO_DROPOUT}, ("c_attn", "attn.c_proj"), "wte", "ln_f", "h", tied=True, biased=True
    ),
    "qwen2": Family("Qwen2Config", {**LLAMA, "tie_word_embeddings": True}, (*QKV, "o_proj"), biased=True),
    "opt": Family("OPTConfig", OPT, (*QKV, "out_proj"), norm="final_layer_norm", biased=True),
    "gemma": Family("GemmaConfig", {**LLAMA, "head_dim": 16}, (*QKV, "o_proj")),
    "mixtral": Family(
        "MixtralConfig",
        {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
        (*QKV, "o_proj"),
        tied=False,
        stacks=("gate_up_proj", "down_proj"),
    ),
}


@dataclass(frozen=True)
class Variant:
    """A variant of LoRA as options of peft and of `LoraConfig`; None for a side that does not make it.

    converted: peft changes the base at the start, and saves with `path_initial_model_for_weight_conversion`.
    everywhere: combined with every choice of targets, not only with PLAIN_TARGETS.
    """

    peft: dict[str, Any] | None
    ours: dict[str, Any] | None
    converted: bool = False
    everywhere: bool = True


VARIANTS = {
    "lora": Variant({}, {}),
    "use_rslora": Variant({"use_rslora": True}, {"use_rslora": True}),
    "dora": Variant({"use_dora": True}, {"variant": "dora"}),
    "rsdora": Variant(
        {"use_dora": True, "use_rslora": True}, {"variant": "dora", "use_rslora": True}, everywhere=False
    ),
    "kaiming": Variant({"init_lora_weights": True}, {"init_lora_weights": "kaiming"}, everywhere=False),
    "gaussian": Variant({"init_lora_weights": "gaussian"}, {"init_lora_weights": "gaussian"}),
    "orthogonal": Variant({"init_lora_weights": "orthogonal"}, {"init_lora_weights": "orthogonal"}),
    "pissa": Variant({"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa"}, converted=True),
    "rspissa": Variant(
        {"init_lora_weights": "pissa", "use_rslora": True},
        {"init_lora_weights": "pissa", "use_rslora": True},
        converted=True,
        everywhere=False,
    ),
    "olora": Variant({"init_lora_weights": "olora"}, None, converted=True, everywhere=False),
    "loftq": Variant(
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
        {"init_lora_weights": "loftq"},
        everywhere=False,
    ),
    "mica": Variant({"init_lora_weights": "mica"}, None, everywhere=False),
    "pissa_as_trained": Variant({"init_lora_weights": "pissa"}, None, everywhere=False),
    "lora_bias": Variant({"lora_bias": True}, {"variant": "lora_bias"}, everywhere=False),
    "kasa": Variant({"kasa_config": {}}, None, everywhere=False),
    "alora": Variant({"alora_invocation_tokens": [2], "task_type": "CAUSAL_LM"}, None, everywhere=False),
}
PLAIN_TARGETS = ("attention", "all_linear")


def target_options(family: Family) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Returns {choice of targets: (options of peft, options of LoraConfig)} for the layers of this family."""
    attention, first = list(family.attention), family.attention[0]
    some: dict[str, Any] = {"target_modules": attention}
    every: dict[str, Any] = {"target_modules": "all-linear"}
    patterns = {
        **every,
        "rank_pattern": {first: 2},
        "alpha_pattern": {rf"{family.blocks}\.1\..*": 5},
    }
    regex = {"target_modules": rf".*\.1\..*({'|'.join(map(re.escape, attention))})"}
    whole = [family.norm] if family.tied else [family.norm, "lm_head"]
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "attention": (some, some),
        "all_linear": (every, every),
        "regex": (regex, regex),
        "embedding": ({"target_modules": [family.embedding, first]},) * 2,
        "head": ({"target_modules": ["lm_head", first]},) * 2,
        "patterns": (patterns, patterns),
        "exclude": ({**every, "exclude_modules": [first]},) * 2,
        "layers": ({**some, "layers_to_transform": [1]}, {**some, "layers_to_transform": (1,)}),
        "whole": ({**some, "modules_to_save": whole}, {**some, "modules_to_save": tuple(whole)}),
        "tokens": (
            {**some, "trainable_token_indices": list(TOKENS_TRAINED)},
            {**some, "trainable_token_indices": TOKENS_TRAINED},
        ),
    }
    if family.biased:
        found["biases"] = ({**some, "bias": "all"},) * 2
        found["own_biases"] = ({**some, "bias": "lora_only"},) * 2
    if family.stacks:
        parameters = [f"experts.{name}" for name in family.stacks]
        router = {**some, "target_parameters": ["gate.weight"]}, {"target_modules": [*attention, "gate"]}
        found["router"] = router
        found["stacks"] = ({**some, "target_parameters": parameters}, {"target_modules": [*attention, *family.stacks]})
    return found


@dataclass(frozen=True)
class Subject:
    """A model and its adaptation, by the names of the tables above."""

    family: str
    variant: str
    targets: str
    base: str

    def __str__(self) -> str:
        return " ".join((self.family, self.variant, self.targets, self.base))

    def peft_options(self) -> dict[str, Any]:
        options = {"r": RANK, "lora_alpha": ALPHA, **(VARIANTS[self.variant].peft or {})}
        return {**options, **target_options(FAMILIES[self.family])[self.targets][0]}

    def our_options(self) -> dict[str, Any]:
        options = {"rank": RANK, "alpha": ALPHA, **(VARIANTS[self.variant].ours or {})}
        return {**options, **target_options(FAMILIES[self.family])[self.targets][1]}

    def not_built(self) -> str | None:
        """Returns the reason why LoraConfig cannot express this subject, or None if it can."""
        lacking = sorted(self.our_options().keys() - {field.name for field in dataclasses.fields(LoraConfig)})
        return f"not built yet: LoraConfig has no {', '.join(lacking)}" if lacking else None

    def directions(self) -> tuple[str, ...]:
        """Returns the directions that exist for this base and this variant."""
        variant = VARIANTS[self.variant]
        out = {"merge"} if self.base != "none" else set()
        out |= {"bf16"} if self.base == "int8" else set()
        out |= set() if variant.ours is not None else {"to_peft", "files"}
        return tuple(direction for direction in DIRECTIONS if direction not in out)


def subjects(whole_product: bool = False) -> Iterator[Subject]:
    """Yields all subjects. Variants that are not `everywhere` get PLAIN_TARGETS only, unless `whole_product` is set."""
    for name, family in FAMILIES.items():
        for base, (variant, settings) in itertools.product(BASES, VARIANTS.items()):
            for targets in target_options(family):
                if settings.everywhere or whole_product or targets in PLAIN_TARGETS:
                    yield Subject(name, variant, targets, base)


@dataclass(frozen=True)
class Refusal:
    """An intended refusal: a pattern of its sentence, and the subjects that it applies to (None: all)."""

    kind: str
    sentence: str
    targets: tuple[str, ...] | None = None
    variants: tuple[str, ...] | None = None
    families: tuple[str, ...] | None = None

    def is_for(self, subject: Subject) -> bool:
        asked = (
            (self.targets, subject.targets),
            (self.variants, subject.variant),
            (self.families, subject.family),
        )
        return all(names is None or name in names for names, name in asked)


# The refusals of this library, by their sentences. Any other refusal is a failure.
CONVERTED = tuple(name for name, variant in VARIANTS.items() if variant.converted)
KNOWN_REFUSALS = (
    Refusal(
        "dropout or DoRA on stacks",
        r"variant must be lora on a ",
        ("stacks", "router"),
        variants=("dora", "rsdora"),
    ),
    Refusal(
        "an initialization for linear layers alone",
        r"^init_lora_weights '\w+' is for linear layers",
        ("embedding", "stacks", "router"),
    ),
    Refusal("layers that peft lost in its conversion", r"match no layer in the file", ("embedding",), CONVERTED),
    Refusal("LoftQ without a packed layer", r"is not packed and has no error", variants=("loftq",)),
    Refusal("a start that changes the base", r"init_lora_weights=.*does not support", variants=("pissa_as_trained",)),
    Refusal("another method", r"does not support", variants=("kasa", "alora")),
    Refusal("a bias that the checkpoint lacks", r"adds a bias to layers that have none", variants=("lora_bias",)),
)


def known_refusal(subject: Subject, sentence: str) -> str | None:
    """Returns the kind of an expected refusal of this subject, or None for any other sentence."""
    if subject.not_built() and (sentence == subject.not_built() or "does not support" in sentence):
        return "not built yet"
    for known in KNOWN_REFUSALS:
        if known.is_for(subject) and re.search(known.sentence, sentence):
            return known.kind
    return None
