"""The names of settings that are nearest to a wrong one, and what other programs call a setting."""

from __future__ import annotations

import difflib
from collections.abc import Collection

# Names of axolotl, LLaMA-Factory, transformers, peft and trl. A file with one of them is told the name that is meant.
OTHER_NAMES = {
    **dict.fromkeys(("base_model", "model_name_or_path", "model_name", "pretrained_model_name_or_path"), "model"),
    **dict.fromkeys(("datasets", "dataset", "dataset_path", "train_file", "train_dataset"), "data"),
    **dict.fromkeys(("test_datasets", "eval_dataset", "validation_file"), "eval_data"),
    **dict.fromkeys(("val_set_size", "val_size", "test_size"), "eval_share"),
    **dict.fromkeys(("output_dir", "output_path"), "output"),
    **dict.fromkeys(("lora_r", "lora_rank", "r"), "rank"),
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    **dict.fromkeys(("lora_target", "lora_target_modules", "lora_target_linear"), "target_modules"),
    "lora_modules_to_save": "modules_to_save",
    **dict.fromkeys(("peft_use_rslora", "rslora"), "use_rslora"),
    **dict.fromkeys(("peft_use_dora", "use_dora", "dora"), "variant"),
    **dict.fromkeys(("peft_init_lora_weights", "init_lora"), "init_lora_weights"),
    "loraplus_lr_ratio": "lora_plus_ratio",
    **dict.fromkeys(("lora_model_dir", "adapter_name_or_path", "adapter", "adapter_path"), "from_adapter"),
    **dict.fromkeys(("max_steps", "total_steps"), "steps"),
    **dict.fromkeys(("num_epochs", "num_train_epochs"), "epochs"),
    **dict.fromkeys(("lr", "peak_lr"), "learning_rate"),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type", "scheduler"), "schedule"),
    **dict.fromkeys(("min_lr", "cosine_min_lr"), "min_learning_rate"),
    "warmup": "warmup_steps",
    **dict.fromkeys(("micro_batch_size", "per_device_train_batch_size", "train_batch_size"), "batch_size"),
    **dict.fromkeys(("gradient_accumulation_steps", "grad_accumulation_steps"), "gradient_accumulation"),
    **dict.fromkeys(("sequence_len", "cutoff_len", "max_seq_length", "max_seq_len", "model_max_length"), "max_length"),
    "sample_packing": "packing",
    **dict.fromkeys(("gradient_checkpointing", "activation_checkpointing"), "checkpointing"),
    **dict.fromkeys(("max_grad_norm_value", "gradient_clipping"), "max_grad_norm"),
    **dict.fromkeys(("optim", "optimizer_type"), "optimizer"),
    **dict.fromkeys(
        ("load_in_4bit", "load_in_8bit", "quantization_bit", "quantization", "bnb_4bit_quant_type", "quant_type"),
        "format",
    ),
    **dict.fromkeys(("bnb_4bit_use_double_quant", "double_quantization"), "double_quant"),
    "save_total_limit": "keep_last",
    "early_stopping_patience": "patience",
    "max_samples": "limit",
    "resume_from_checkpoint": "resume",
    "overwrite_output_dir": "overwrite",
    **dict.fromkeys(("report_to", "use_tensorboard", "use_wandb", "use_mlflow"), "track"),
}
NEAREST = 0.6


def nearest_name(name: str, known: Collection[str]) -> str | None:
    """Returns the known name that a wrong one probably means; None if none is near."""
    plain = name.strip().lstrip("-").replace("-", "_").replace(" ", "_").lower()
    meant = OTHER_NAMES.get(plain)
    if meant in known:
        return meant
    found = difflib.get_close_matches(plain, known, 1, NEAREST)
    return found[0] if found else None
