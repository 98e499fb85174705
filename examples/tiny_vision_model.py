"""Makes small random vision-language models with tokenizer and image processor, as checkpoints, for scripts and tests.

Each has two layers in the language model and two in the vision tower, and reads images of 28 x 28 pixels.
"""

from __future__ import annotations

import json
import logging
import string
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{{% for message in messages %}}<{{{{ message['role'] }}}}>"
    "{{% if message['content'] is string %}}{{{{ message['content'] }}}}{{% else %}}"
    "{{% for part in message['content'] %}}{{% if part['type'] == 'image' %}}{image}{{% else %}}{{{{ part['text'] }}}}"
    "{{% endif %}}{{% endfor %}}{{% endif %}}</s>{{% endfor %}}"
    "{{% if add_generation_prompt %}}<assistant>{{% endif %}}"
)
# How each family writes an image in its chat template.
FAMILIES = {
    "gemma3": "<start_of_image>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "llava": "<image>",
    "smolvlm": "<image>",
    "idefics3": "<image>",
}
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "<system>", "<user>", "<assistant>"]
# Special tokens that processors ask the tokenizer for, by the name of the attribute.
NAMED_TOKENS = {
    "gemma3": {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    },
    "qwen": {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    },
    "llava": {"image_token": "<image>"},
    "idefics3": {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "end_of_utterance_token": "<end_of_utterance>",
        "global_image_token": "<global-img>",
    },
}
PIXELS = 28


def _named_tokens(family: str) -> dict[str, str]:
    kind = "qwen" if family.startswith("qwen") else "idefics3" if family == "smolvlm" else family
    return NAMED_TOKENS[kind]


def _tokenizer(family: str) -> Any:
    """One token per character, and the special tokens of the family."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    named = _named_tokens(family)
    special = [*SPECIAL_TOKENS, *named.values()]
    vocabulary = {token: number for number, token in enumerate([*special, *string.printable])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    core.add_special_tokens(special)
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    template = TEMPLATE.format(image=FAMILIES[family])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, **marks, extra_special_tokens=named, chat_template=template, model_max_length=2048
    )


def _config(family: str, tokenizer: Any, hidden: int) -> Any:
    import transformers

    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _named_tokens(family).items()}
    image = ids["image_token"]
    text = {"vocab_size": len(tokenizer), "hidden_size": hidden, "intermediate_size": 2 * hidden, "head_dim": 16}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 2048}
    layers = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "initializer_range": 0.2}
    vision = {**layers, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": PIXELS, "patch_size": 7}
    if family == "gemma3":
        between = {"boi_token_index": ids["boi_token"], "eoi_token_index": ids["eoi_token"], "image_token_index": image}
        text |= {"query_pre_attn_scalar": 16, "sliding_window": 64}
        vision |= {"vision_use_head": False}
        return transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **between)
    if family == "llava":
        tower = transformers.CLIPVisionConfig(**vision, projection_dim=hidden)
        language = transformers.LlamaConfig(**text)
        parts = {"text_config": language, "vision_config": tower}
        return transformers.LlavaConfig(**parts, image_token_index=image, image_seq_length=16)
    if family in ("smolvlm", "idefics3"):
        make = transformers.SmolVLMConfig if family == "smolvlm" else transformers.Idefics3Config
        text |= {"model_type": "llama"}
        return make(
            text_config=text, vision_config=vision, image_token_id=image, scale_factor=2, tie_word_embeddings=False
        )
    between = {"video_token_id": ids["video_token"], "vision_start_token_id": ids["vision_start_token"]}
    between |= {"vision_end_token_id": ids["vision_end_token"], "image_token_id": image}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
    tower = {**layers, "depth": 2, "num_heads": 2, "patch_size": 7, "spatial_merge_size": 2, "temporal_patch_size": 2}
    tower |= {"out_hidden_size": hidden}
    if family == "qwen2_5_vl":
        tower |= {"window_size": PIXELS, "fullatt_block_indexes": [1]}
        return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=tower, **between)
    tower |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    return transformers.Qwen3VLConfig(text_config=text, vision_config=tower, **between)


def _save_processor(family: str, folder: Path) -> None:
    """Writes the processor's files as published checkpoints have them."""
    import transformers

    square = {"height": PIXELS, "width": PIXELS}
    settings: dict[str, Any] = {}
    if family == "gemma3":
        images, name = transformers.Gemma3ImageProcessorPil(size=square), "Gemma3Processor"
        settings = {"image_seq_length": 4}
    elif family == "llava":
        images = transformers.CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=square)
        name = "LlavaProcessor"
        settings = {"patch_size": 7, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    elif family in ("smolvlm", "idefics3"):
        kind = "SmolVLM" if family == "smolvlm" else "Idefics3"
        edge = {"longest_edge": PIXELS}
        images = getattr(transformers, f"{kind}ImageProcessorPil")(
            size=edge, max_image_size=edge, do_image_splitting=False
        )
        name, settings = f"{kind}Processor", {"image_seq_len": 4}
    else:
        limits = {"shortest_edge": PIXELS**2, "longest_edge": 4 * PIXELS**2}
        images = transformers.Qwen2VLImageProcessorPil(patch_size=7, merge_size=2, size=limits)
        name = "Qwen2_5_VLProcessor" if family == "qwen2_5_vl" else "Qwen3VLProcessor"
    images.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": name, **settings}))


def make_tiny_vision_model(folder: Path, family: str = "smolvlm", hidden: int = 32) -> Path:
    """Writes a checkpoint of one of FAMILIES into `folder`, and returns the folder."""
    import torch
    import transformers

    tokenizer = _tokenizer(family)
    torch.manual_seed(0)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = _config(family, tokenizer, hidden)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("mm_input_projection_weight"):  # Gemma 3's starts as zeros, which let nothing through
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _save_processor(family, folder)
    return folder
