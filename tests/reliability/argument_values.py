"""Wrong values of options of the command line, by the option's name, for bad_arguments.py."""

from __future__ import annotations

HUGE = str(10**30)
SIZES = ("lots", "-1", "nan", "5 apples", "1e3", "9" * 5000)
# Wrong values of other options.
VALUES = {
    **dict.fromkeys(("format", "embedding_format", "variant", "bias", "optimizer"), ("quux", "NF4")),
    **dict.fromkeys(("mode", "device", "schedule"), ("quux", "Cosine")),
    "base_in": ("quux", "Disk", "host"),
    "best_by": ("quux", "Loss", "exact_match", "exact match"),
    **dict.fromkeys(("base", "names", "dtype", "require"), ("quux", "fp 16")),
    **dict.fromkeys(("memory", "memory_budget", "max_shard_size", "overhead"), SIZES),
    "checkpointing": ("most", "0", "-1"),
    "gguf": ("quux", "Q8_0", "fp16"),
    "track": ("quux", "TensorBoard", "all", "tensorboard,wandb"),
    "task": ("quux", "Causal-LM", "LlamaConfig", "masked-lm"),
    "skip_modules": (),  # of names that no module has, none is refused
    "repository": ("a/b/c", "a b", "me/", "..", "me/a--b", "me/\n", "x" * 200),
    "revision": ("a b", "..", "-x", "a..b", "a/", "a.lock", "x" * 300),
    "init_lora_weights": ("quux", "loftq:0", "loftq:5", "loftq:x"),
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "modules_to_save"), ("quux", ",", "q_proj;k_proj", "q_proj\nk_proj")
    ),
    "layers_to_transform": ("a", "3-1", "-1", "1.5", "7", "0-99999999999", "9" * 5000),
    "system": (),  # any text is right
    "host": ("256.1.1.1", "192.0.2.1", "0.0.0.0", "::", "a b"),
    "token": ("short", "with spaces in between", "\u00fc" * 20, "new\nline" * 4),
    "learn": ("answer", "ALL"),
    "max_grad_norm": ("many", "None", "0", "-1", "nan", "inf"),
    "keep_last": ("many", "All", "0", "-1", "1.5", HUGE),
    "field": ("prompt", "=q", "prompt=", "question=q", "prompt"),
    "trainable_token_indices": ("a", "-1", "1.5", "1,1", "107", HUGE, "9" * 5000),
}
WHOLE_NUMBERS = ("many", "1.5", "1e3", "nan", "inf", "0x10", "-1", "0", HUGE)
NUMBERS = ("many", "1,5", "nan", "inf", "-inf", "-1", "0", HUGE)
# Those that are right for some options.
RIGHT = {
    **dict.fromkeys(("seed", "warmup_steps", "keep_best", "skip_bad", "show", "queue", "port"), ("0",)),
    **dict.fromkeys(("warmup_ratio", "min_learning_rate"), ("0",)),
    "weight_decay": ("0", HUGE),
    "neftune_noise_alpha": (HUGE,),
    "alpha": ("-1", "0", HUGE),
    "dropout": ("0",),
    "temperature": ("0", HUGE),
    "time_limit": (HUGE,),
    **dict.fromkeys(("learning_rate", "lora_plus_ratio"), (HUGE,)),
}
