"""Will vLLM serve an adapter, and llama.cpp convert it? Each rule with the place that it was read at.

Whether a base model has the layers, and whether its implementation there takes adapters, no rule here knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_lite.errors import ConfigError, listing
from qlora_lite.lora.peft.describe import AdapterFacts
from qlora_lite.lora.peft.keys import NOT_SET, base_changing_init
from qlora_lite.lora.variants import PEFT_OPTIONS, VARIANTS

VLLM, LLAMA_CPP = "vllm", "llama.cpp"
# vllm/config/lora.py: MaxLoRARanks, and the default of max_lora_rank.
VLLM_MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_MAX_RANK = 16
# vllm/lora/utils.py, is_base_embedding_weights.
VLLM_SKIPPED_ENDS = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
# vllm/lora/utils.py, parse_fine_tuned_lora_name: what a key must end with.
VLLM_KEY_ENDS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
# embedding_modules of the models in vllm/model_executor/models that have any.
VLLM_EMBEDDINGS = ("embed_tokens", "lm_head")
# vllm/lora/peft_helper.py, _validate_features and validate_legal: refused by name; older releases ignored those after
# bias. Of modules_to_save, heads of classifiers (`classifier`, `score`) are let through there, for such models.
VLLM_REFUSED_OPTIONS = (
    "modules_to_save",
    "bias",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "use_bdlora",
    "use_qalora",
)
# Options that change what is computed and that convert_lora_to_gguf.py does not read; alora_invocation_tokens it does.
LLAMA_CPP_UNREAD_OPTIONS = (
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
# convert_lora_to_gguf.py, get_tensors: `in`, not `endswith`.
LLAMA_CPP_PARTS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
LLAMA_CPP_KEPT = (".base_layer.weight", "_layernorm", ".norm")


@dataclass(frozen=True)
class Verdict:
    """Whether a program takes an adapter for what it is: reasons why not, and notes on what it depends on."""

    program: str
    reasons: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def accepted(self) -> bool:
        return not self.reasons

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        return {"accepted": self.accepted, "reasons": list(self.reasons), "notes": list(self.notes)}


def _set(config: dict[str, Any], options: tuple[str, ...]) -> list[str]:
    return [option for option in options if config.get(option) not in NOT_SET]


def _other_base(facts: AdapterFacts) -> list[str]:
    """Both programs add B A to the base as it is, and peft had changed the base before it trained A and B."""
    start = base_changing_init(facts.config)
    return [] if start is None else [f"init_lora_weights={start!r}: A and B belong to a base weight that it changed"]


def vllm_verdict(facts: AdapterFacts, max_lora_rank: int = VLLM_DEFAULT_MAX_RANK) -> Verdict:
    """What vLLM says of an adapter, by its loader of 2026 (vllm/lora/peft_helper.py, lora_model.py, utils.py).

    max_lora_rank: vLLM's own setting. ConfigError for one that vLLM does not have.
    """
    if max_lora_rank not in VLLM_MAX_RANKS:
        allowed = ", ".join(map(str, VLLM_MAX_RANKS))
        raise ConfigError(f"max_lora_rank must be one of {allowed}, as vLLM has it; got {max_lora_rank}")
    config = facts.config
    # PEFTHelper.from_dict: fields without a default.
    lost = [name for name in ("r", "lora_alpha", "target_modules") if name not in config]
    reasons = [f"{', '.join(lost)}: missing in adapter_config.json"] if lost else []
    options = tuple(dict.fromkeys((*PEFT_OPTIONS, *VLLM_REFUSED_OPTIONS)))  # no variant is supported there
    reasons += [f"{option}: vLLM does not support it" for option in _set(config, options)]
    reasons += _other_base(facts)
    # validate_legal; rank_pattern counts, used or not.
    patterns = [number for number in (config.get("rank_pattern") or {}).values() if isinstance(number, int)]
    rank = max([int(config.get("r", 0)), *patterns, *(layer.rank for layer in facts.layers)])
    if rank > max_lora_rank:
        enough = next((size for size in VLLM_MAX_RANKS if size >= rank), None)
        help_ = f"--max-lora-rank {enough} is enough" if enough else f"vLLM's largest is {VLLM_MAX_RANKS[-1]}"
        reasons.append(f"rank {rank} is above max_lora_rank {max_lora_rank}; {help_}")
    foreign = [key for key in facts.keys if not key.endswith((*VLLM_KEY_ENDS, *VLLM_SKIPPED_ENDS))]
    if foreign:
        reasons.append(f"unsupported LoRA weights: {listing(foreign, 3)}")
    # LoRAModel.from_local_checkpoint: layers that its model does not name are an error.
    embeddings = [layer for layer in facts.layers if layer.kind == "embedding" or layer.last == "lm_head"]
    if strange := [layer.name for layer in embeddings if layer.last not in VLLM_EMBEDDINGS]:
        reasons.append(f"embeddings that vLLM's models do not name in embedding_modules: {listing(strange, 3)}")
    if convolutions := [layer.name for layer in facts.layers if layer.kind == "convolution"]:
        reasons.append(f"convolutions, which vLLM has no adapters for: {listing(convolutions, 3)}")
    notes = []
    if embeddings and not strange:
        notes.append("adapters on embedding or head: only for models with embedding_modules (Llama, Mistral, ...)")
    if _set(config, ("rank_pattern", "alpha_pattern")):
        # LoRALayerWeights.from_config took PEFTHelper's r and scaling before get_rank_and_scaling was added.
        notes.append(
            "rank_pattern, alpha_pattern: older vLLM does not read them, and scales all layers by lora_alpha / r"
        )
    return Verdict(VLLM, tuple(reasons), tuple(notes))


def llama_cpp_verdict(facts: AdapterFacts) -> Verdict:
    """What llama.cpp makes of an adapter (convert_lora_to_gguf.py, and src/llama-adapter.h for the scale).

    A gguf adapter has one alpha, and each layer is scaled by alpha / rank, the rank read from its matrix.
    """
    config = facts.config
    reasons = [] if "lora_alpha" in config else ["lora_alpha: missing in adapter_config.json"]
    reasons += _other_base(facts)
    variant = VARIANTS[facts.variant]
    if variant.parameters:
        titles = " and ".join(extra.title for extra in variant.parameters)
        reasons.append(f"{variant.peft_option}: {titles} are not lora_A or lora_B, and the converter stops at them")
    passed = (*LLAMA_CPP_PARTS, *LLAMA_CPP_KEPT, *(f".{extra.peft_key}" for extra in variant.parameters))
    foreign = [key for key in facts.keys if not any(part in key for part in passed)]
    if foreign:
        reasons.append(f"not a lora_A or lora_B tensor, the converter stops: {listing(foreign, 3)}")
    if facts.use_rslora and any(layer.rank != 1 for layer in facts.layers):
        reasons.append("use_rslora: not read, each layer would be scaled by alpha / rank")
    if len({layer.alpha for layer in facts.layers} | {config.get("lora_alpha")}) > 1:
        reasons.append("alpha_pattern: not read, every layer would get lora_alpha")
    if config.get("lora_alpha") == 0:
        reasons.append("lora_alpha 0: llama.cpp takes it for a scale of 1")
    reasons += [f"{option}: not read" for option in _set(config, LLAMA_CPP_UNREAD_OPTIONS)]
    if odd := [layer.name for layer in facts.layers if layer.kind in ("convolution", "experts")]:
        reasons.append(f"A and B that are no pair of matrices of one layer: {listing(odd, 3)}")
    notes = []
    if facts.base is None:
        notes.append("base_model_name_or_path is not set: give the converter --base")
    if any(layer.last == "lm_head" for layer in facts.layers):
        notes.append("lm_head: refused for bases whose embeddings are tied")
    return Verdict(LLAMA_CPP, tuple(reasons), tuple(notes))


def verdicts(facts: AdapterFacts, max_lora_rank: int = VLLM_DEFAULT_MAX_RANK) -> dict[str, Verdict]:
    """What each program makes of an adapter, by its name."""
    return {VLLM: vllm_verdict(facts, max_lora_rank), LLAMA_CPP: llama_cpp_verdict(facts)}
