"""What vLLM, llama.cpp's converter and transformers 4 would misread of a checkpoint, in one sentence each.

None of them complains about most of this: transformers 4 passes over keys that it does not know, and takes the default
of the family, and llama.cpp computes with what it has built in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from qlora_lite.errors import CheckpointError, listing
from qlora_lite.export.gguf.families import FAMILIES, family_of
from qlora_lite.export.gguf.library import gguf, tensor_names
from qlora_lite.export.gguf.tensors import stack_name
from qlora_lite.export.gguf.tokenizer import tokenizer_settings
from qlora_lite.export.readers.checkpoint_folder import CheckpointDescription
from qlora_lite.lora.peft.compatibility import LLAMA_CPP, VLLM, Compatibility

TRANSFORMERS_4 = "transformers-4"
READERS = (VLLM, LLAMA_CPP, TRANSFORMERS_4)
# The class that transformers 5 names for a tokenizer of no family.
NEW_TOKENIZER = "TokenizersBackend"
# Methods of packing whose weights llama.cpp's converter unpacks (ModelBase.dequant_model).
UNPACKED_BY_LLAMA_CPP = ("bitnet", "fp8", "gptq", "compressed-tensors", "modelopt", "mxfp4")
# Buffers in checkpoints of older releases, which the converter passes over.
PASSED_OVER = re.compile(r".*(\.attention\.masked_bias|\.attention\.bias|\.attn\.bias|\.attn\.masked_bias|inv_freq)")
ROPE_KEYS = ("rope_theta", "rope_scaling")


def check_readers(described: CheckpointDescription, programs: Collection[str] = READERS) -> dict[str, Compatibility]:
    """Returns, for each of the programs, whether it reads the checkpoint as the model that it is.

    Raises ConfigError if llama.cpp is one of them and the `gguf` package, which has its names, is missing.
    """
    rules = {VLLM: _vllm, LLAMA_CPP: _llama_cpp, TRANSFORMERS_4: _transformers_4}
    return {program: rules[program](described) for program in READERS if program in programs}


def _names(described: CheckpointDescription) -> list[str]:
    """Tensors that have transformers 5's names: others load a model without them, some without a word."""
    own = described.own_names
    return [f"names of tensors that transformers 5 alone has: {listing(own, 3)}"] if own else []


def _old_spellings(described: CheckpointDescription) -> list[str]:
    """Settings that transformers 4 looks for under another key, and replaces by a default."""
    reasons = []
    for prefix, part in described.parts():
        rope = part.get("rope_parameters")
        if isinstance(rope, dict) and "rope_theta" not in part:
            reasons.append(f"{prefix}rope_parameters without {prefix}rope_theta: the family's default is taken")
        nested = rope.get("full_attention", rope) if isinstance(rope, dict) else {}
        kind = nested.get("rope_type", "default") if isinstance(nested, dict) else "default"
        if kind != "default" and not part.get("rope_scaling"):
            reasons.append(f"{prefix}rope_parameters of type {kind} without {prefix}rope_scaling: positions not scaled")
        if "dtype" in part and "torch_dtype" not in part:
            reasons.append(f"{prefix}dtype without {prefix}torch_dtype: releases before 4.56 take float32")
    return reasons


def _transformers_4(described: CheckpointDescription) -> Compatibility:
    reasons = [*_names(described), *_old_spellings(described)]
    if described.tokenizer_class == NEW_TOKENIZER:
        reasons.append(f"tokenizer_class {NEW_TOKENIZER}: it has no such class; PreTrainedTokenizerFast is the same")
    notes = [] if described.packed_by is None else [f"packed: needs {described.packed_by}"]
    return Compatibility(TRANSFORMERS_4, tuple(reasons), tuple(notes))


def _vllm(described: CheckpointDescription) -> Compatibility:
    """vLLM reads configs and tokenizers through the transformers that it was installed with, which may be 4."""
    reasons = [*_names(described), *_old_spellings(described)]
    notes = ["config.json is read by vLLM's own transformers; the reasons about keys are those of release 4"]
    if described.packed_by is not None:
        notes.append(f"packed: vLLM needs {described.packed_by}")
    return Compatibility(VLLM, tuple(reasons), tuple(notes) if reasons or described.packed_by else ())


def _architecture(model_type: str) -> str | None:
    """Returns GGUF's name of a model type of transformers; None if it has none."""
    if model_type in FAMILIES:
        return FAMILIES[model_type].architecture
    spelled = {re.sub(r"[-_.]", "", name): name for name in gguf().MODEL_ARCH_NAMES.values()}
    return spelled.get(re.sub(r"[-_.]", "", model_type.removesuffix("_text")))


def _llama_cpp(described: CheckpointDescription) -> Compatibility:
    if described.packed_by is not None and described.packed_by not in UNPACKED_BY_LLAMA_CPP:
        reason = f"packed by {described.packed_by}, which the converter does not unpack; merge into full precision"
        return Compatibility(LLAMA_CPP, (reason,))
    config = described.config
    architecture = _architecture(config.model_type)
    if architecture is None:
        return Compatibility(
            LLAMA_CPP, (f"model type {config.model_type}: the gguf package has no architecture for it",)
        )
    reasons, notes = _names(described), []
    named = tensor_names(architecture, config.get_text_config().num_hidden_layers)
    stacked = {stack_name(name): name for name in described.tensors if not PASSED_OVER.fullmatch(name)}
    unknown = [name for stack, name in stacked.items() if named(stack) is None and name not in described.own_names]
    if unknown and described.packed_by is None:
        reasons.append(f"tensors that llama.cpp's {architecture} has no name for: {listing(unknown, 3)}")
    if config.model_type not in FAMILIES:
        notes.append(f"{config.model_type}: settings and tokenizer are checked for {', '.join(FAMILIES)} alone")
    else:
        reasons += _refusals(described)
    return Compatibility(LLAMA_CPP, tuple(reasons), tuple(notes))


def _refusals(described: CheckpointDescription) -> list[str]:
    """Returns why a config, and a tokenizer, would be something else in llama.cpp."""

    def refused(check: Callable[[], object]) -> str | None:
        try:
            check()
        except CheckpointError as error:
            return str(error)
        return None

    config, folder = described.config, described.folder
    found = [refused(lambda: family_of(config))]
    found.append(refused(lambda: tokenizer_settings(folder, config, config.vocab_size)))
    return [reason for reason in found if reason is not None]
