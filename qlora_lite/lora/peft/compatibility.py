"""Whether peft loads an adapter, vLLM serves it and llama.cpp converts it, by rules that name the source they are from.

The rules do not know whether a base model has the layers, nor whether its implementation there takes adapters. Those
for peft need the type of the base, which `save_adapter` notes beside the adapter (base_identity.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qlora_lite.checkpoints.base_identity import MODEL_TYPE
from qlora_lite.errors import ConfigError, listing
from qlora_lite.lora.peft.describe import AdapterDescription
from qlora_lite.lora.peft.lost_layers import RENAMED, lost_in_peft
from qlora_lite.lora.peft.options import UNSET, base_changing_init
from qlora_lite.lora.variants import PEFT_OPTIONS, VARIANTS

PEFT, VLLM, LLAMA_CPP = PROGRAMS = ("peft", "vllm", "llama.cpp")
# vllm/config/lora.py: MaxLoRARanks, and the default of max_lora_rank.
VLLM_MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_MAX_RANK = 16
# vllm/lora/utils.py, is_base_embedding_weights.
VLLM_SKIPPED_ENDS = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
# vllm/lora/utils.py, parse_fine_tuned_lora_name: the accepted endings of keys.
VLLM_KEY_ENDS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
# embedding_modules of the models in vllm/model_executor/models.
VLLM_EMBEDDINGS = ("embed_tokens", "lm_head")
# vllm/lora/peft_helper.py, _validate_features and validate_legal: refused by name, as the options of the variants are;
# older releases ignored those after bias. For classifiers, vLLM accepts their heads (`classifier`, `score`) in
# modules_to_save.
VLLM_REFUSED_OPTIONS = (
    "modules_to_save",
    "bias",
    "alora_invocation_tokens",
    "layer_replication",
    "use_bdlora",
    "use_qalora",
)
# Options that change what is computed and that convert_lora_to_gguf.py ignores; it reads alora_invocation_tokens.
LLAMA_CPP_IGNORED_OPTIONS = (
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
class Compatibility:
    """Whether a program computes what the adapter means: reasons why not, and notes on conditions."""

    program: str
    reasons: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def accepted(self) -> bool:
        return not self.reasons

    def to_json(self) -> dict[str, object]:
        """Returns plain data for `json.dumps`."""
        return {"accepted": self.accepted, "reasons": list(self.reasons), "notes": list(self.notes)}


def _set_options(config: Mapping[str, object], options: tuple[str, ...]) -> list[str]:
    return [option for option in options if config.get(option) not in UNSET]


def _changed_base(adapter: AdapterDescription) -> list[str]:
    """Both programs add B A to the unchanged base; some initializations of peft change the base before training."""
    init = base_changing_init(adapter.config)
    return [] if init is None else [f"init_lora_weights={init!r}: A and B belong to a base weight that it changed"]


def _largest_rank(adapter: AdapterDescription) -> int:
    """Returns the largest rank that the files name, in a layer, in `r` or in rank_pattern, used or not."""
    rank, pattern = adapter.config.get("r", 0), adapter.config.get("rank_pattern")
    patterns = [number for number in pattern.values() if isinstance(number, int)] if isinstance(pattern, dict) else []
    return max([rank if isinstance(rank, int) else 0, *patterns, *(layer.rank for layer in adapter.layers)])


def peft_compatibility(adapter: AdapterDescription) -> Compatibility:
    """Applies the rules of peft 0.21 (lost_layers.py); what they are not known for is accepted."""
    names = [layer.name for layer in adapter.layers if layer.kind not in ("experts", "router")]
    if adapter.trained_on is not None and MODEL_TYPE in adapter.trained_on.model:
        return Compatibility(PEFT, tuple(lost_in_peft(str(adapter.trained_on.model[MODEL_TYPE]), names)))
    renamed = {last for lasts in RENAMED.values() for last in lasts}
    found = sorted({layer.last for layer in adapter.layers if layer.kind == "linear"} & renamed)
    note = f"the type of the base is unknown: with some kinds of experts peft would not load {', '.join(found)}"
    return Compatibility(PEFT, (), (note,) if found else ())


def vllm_compatibility(adapter: AdapterDescription, max_lora_rank: int = VLLM_DEFAULT_MAX_RANK) -> Compatibility:
    """Applies the rules of vLLM's loader of 2026 (vllm/lora/peft_helper.py, lora_model.py, utils.py).

    max_lora_rank: vLLM's setting of that name. Raises ConfigError for a value that vLLM does not take.
    """
    if max_lora_rank not in VLLM_MAX_RANKS:
        allowed = ", ".join(map(str, VLLM_MAX_RANKS))
        raise ConfigError(f"max_lora_rank must be one of {allowed}, as in vLLM; got {max_lora_rank}")
    config = adapter.config
    # PEFTHelper.from_dict: fields without a default.
    missing = [name for name in ("r", "lora_alpha", "target_modules") if name not in config]
    reasons = [f"{', '.join(missing)}: missing in adapter_config.json"] if missing else []
    options = tuple(dict.fromkeys((*PEFT_OPTIONS, *VLLM_REFUSED_OPTIONS)))  # vLLM supports no variant
    reasons += [f"{option}: vLLM does not support it" for option in _set_options(config, options)]
    reasons += _changed_base(adapter)
    # validate_legal
    rank = _largest_rank(adapter)
    if rank > max_lora_rank:
        enough = next((size for size in VLLM_MAX_RANKS if size >= rank), None)
        hint = f"--max-lora-rank {enough} is enough" if enough else f"vLLM's largest is {VLLM_MAX_RANKS[-1]}"
        reasons.append(f"rank {rank} is above max_lora_rank {max_lora_rank}; {hint}")
    foreign = [key for key in adapter.keys if not key.endswith((*VLLM_KEY_ENDS, *VLLM_SKIPPED_ENDS))]
    if foreign:
        reasons.append(f"unsupported LoRA weights: {listing(foreign, 3)}")
    # LoRAModel.from_local_checkpoint: layers that its model does not name are an error.
    embeddings = [layer for layer in adapter.layers if layer.kind == "embedding" or layer.last == "lm_head"]
    if unknown := [layer.name for layer in embeddings if layer.last not in VLLM_EMBEDDINGS]:
        reasons.append(f"embeddings that vLLM's models do not name in embedding_modules: {listing(unknown, 3)}")
    if convolutions := [layer.name for layer in adapter.layers if layer.kind == "convolution"]:
        reasons.append(f"convolutions, for which vLLM has no adapters: {listing(convolutions, 3)}")
    notes = []
    if embeddings and not unknown:
        notes.append("adapters on embedding or head: only for models with embedding_modules (Llama, Mistral, ...)")
    if _set_options(config, ("rank_pattern", "alpha_pattern")):
        # LoRALayerWeights.from_config took PEFTHelper's r and scaling before get_rank_and_scaling was added.
        notes.append(
            "rank_pattern, alpha_pattern: older vLLM does not read them, and scales all layers by lora_alpha / r"
        )
    return Compatibility(VLLM, tuple(reasons), tuple(notes))


def llama_cpp_compatibility(adapter: AdapterDescription, rescaled: bool = False) -> Compatibility:
    """Applies the rules of llama.cpp (convert_lora_to_gguf.py, and src/llama-adapter.h for the scale).

    A gguf adapter has one alpha, and each layer is scaled by alpha / rank, with the rank read from its matrix.
    rescaled: whether B is multiplied by what is lacking, as our own writer does (export/gguf/adapter.py).
    """
    config = adapter.config
    reasons = [] if "lora_alpha" in config else ["lora_alpha: missing in adapter_config.json"]
    reasons += _changed_base(adapter)
    variant = VARIANTS[adapter.variant]
    if variant.parameters:
        titles = " and ".join(extra.title for extra in variant.parameters)
        reasons.append(f"{variant.peft_option}: {titles} are not lora_A or lora_B, and the converter stops at them")
    passed = (*LLAMA_CPP_PARTS, *LLAMA_CPP_KEPT, *(f".{extra.peft_key}" for extra in variant.parameters))
    foreign = [key for key in adapter.keys if not any(part in key for part in passed)]
    if foreign:
        reasons.append(f"not a lora_A or lora_B tensor, the converter stops: {listing(foreign, 3)}")
    if not rescaled and adapter.use_rslora and any(layer.rank != 1 for layer in adapter.layers):
        reasons.append("use_rslora: not read, each layer would be scaled by alpha / rank")
    if not rescaled and len({layer.alpha for layer in adapter.layers} | {config.get("lora_alpha")}) > 1:
        reasons.append("alpha_pattern: not read, every layer would get lora_alpha")
    if config.get("lora_alpha") == 0:
        reasons.append("lora_alpha 0: llama.cpp takes it for a scale of 1")
    reasons += [f"{option}: not read" for option in _set_options(config, LLAMA_CPP_IGNORED_OPTIONS)]
    if unlike := [layer.name for layer in adapter.layers if layer.kind in ("convolution", "experts")]:
        reasons.append(f"A and B that are not two matrices of one layer: {listing(unlike, 3)}")
    notes = []
    if adapter.base is None:
        notes.append("base_model_name_or_path is not set: give the converter --base")
    if any(layer.last == "lm_head" for layer in adapter.layers):
        notes.append("lm_head: refused for bases whose embeddings are tied")
    return Compatibility(LLAMA_CPP, tuple(reasons), tuple(notes))


def check_compatibility(
    adapter: AdapterDescription, max_lora_rank: int = VLLM_DEFAULT_MAX_RANK
) -> dict[str, Compatibility]:
    """Returns the compatibility of an adapter with each program, by the program's name."""
    return {
        PEFT: peft_compatibility(adapter),
        VLLM: vllm_compatibility(adapter, max_lora_rank),
        LLAMA_CPP: llama_cpp_compatibility(adapter),
    }
