"""The settings of a training run, LoraConfig and TrainConfig, made of the options of `train`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

from qlora_lite.cli.options import check_not_given, listed, listed_tokens, number_or_word, settings, targets_named
from qlora_lite.errors import ConfigError

if TYPE_CHECKING:
    from qlora_lite.cli.data_options import TrainingData
    from qlora_lite.lora.config import LoraConfig
    from qlora_lite.training.config import TrainConfig

# Stands for the steps of --epochs before the records are read.
LARGEST_STEPS = 2**63 - 1


def lora_config(options: Mapping[str, Any]) -> LoraConfig:
    """The settings of the adapters."""
    from qlora_lite.lora.config import LoraConfig
    from qlora_lite.lora.targets import layer_numbers

    exclude, blocks = options["exclude_modules"], options["layers_to_transform"]
    return settings(
        LoraConfig,
        options,
        target_modules=targets_named("--target-modules", options["target_modules"]),
        exclude_modules=None if exclude is None else targets_named("--exclude-modules", exclude),
        layers_to_transform=None if blocks is None else layer_numbers(blocks),
        modules_to_save=listed(options["modules_to_save"]),
        trainable_token_indices=listed_tokens(options["trainable_token_indices"]),
    )


def train_config(ctx: typer.Context) -> TrainConfig:
    """The settings of the run. With --epochs the steps are known when the records are (`with_epochs`)."""
    from qlora_lite.training.config import TrainConfig, checkpointing_named, steps_of_epochs

    given = ctx.params
    if given["epochs"] is not None:
        check_not_given(ctx, "--epochs", ["steps"])
        steps_of_epochs(given["epochs"], batches=1)  # refuses what is not a number of epochs
    steps = TrainConfig.steps if given["steps"] is None else given["steps"]
    return settings(
        TrainConfig,
        given,
        steps=LARGEST_STEPS if given["epochs"] is not None else steps,
        checkpointing=checkpointing_named(given["checkpointing"] or "full"),
        max_grad_norm=number_or_word("--max-grad-norm", given["max_grad_norm"], "none", float),
        keep_last=number_or_word("--keep-last", given["keep_last"], "all", int),
    )


def with_epochs(config: TrainConfig, data: TrainingData, options: Mapping[str, Any]) -> TrainConfig:
    """The settings with the steps of --epochs, which are printed; without it as they are."""
    from qlora_lite.data.batching import batches_of_epoch
    from qlora_lite.training.config import steps_of_epochs
    from qlora_lite.training.distributed import is_first_process

    epochs, rows = options["epochs"], options["batch_size"]
    if epochs is None:
        return config
    packed_length = options["max_length"] if options["packing"] else None
    batches = batches_of_epoch(data.examples, rows, config.seed, packed_length)
    steps = steps_of_epochs(epochs, batches, config.gradient_accumulation)
    if is_first_process():
        print(f"--epochs {epochs:g}: {steps:,} steps, and {batches:,} batches in an epoch")
    return replace(config, steps=steps)


def check_options(lora: LoraConfig, options: Mapping[str, Any]) -> None:
    """Raises ConfigError for options that this command cannot follow together."""
    from qlora_lite.checkpoints.load import check_base
    from qlora_lite.checks import is_count, require
    from qlora_lite.lora.config import parse_init

    if parse_init(lora.init_lora_weights)[1] > 1:
        raise ConfigError(
            f"init {lora.init_lora_weights!r} packs the base anew, and this command writes no base; use it from Python"
        )
    for name in ("eval_steps", "eval_generate"):
        if options[name] is not None and not options["eval_data"] and options["eval_share"] is None:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} needs held-out records; give --eval-data or --eval-share")
    if options["best_by"] == "exact_match" and options["eval_generate"] is None:
        raise ConfigError("--best-by exact_match goes by answers that are generated; give --eval-generate too")
    most = options["eval_generate"]
    require(most is None or is_count(most, 1), "--eval-generate must be at least 1", most)
    check_base(options["base_in"])
    if options["shard"]:
        _check_shard(options)
    if options["memory_budget"] is not None and options["checkpointing"] is not None:
        raise ConfigError("--memory-budget chooses the checkpointing itself; give it or --checkpointing, not both")


def _check_shard(options: Mapping[str, Any]) -> None:
    """Raises ConfigError for options that cannot be followed with a base in shares, and without other processes."""
    from qlora_lite.checkpoints.load import DISK
    from qlora_lite.sharding.group import check_launched

    if options["base_in"] == DISK:
        raise ConfigError("--shard holds the base in memory; give it or --base-in, not both")
    for name, why in (("memory_budget", "predicts a base that is whole"), ("eval_generate", "writes answers alone")):
        if options[name] is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} {why}, and --shard holds it in shares; leave out one of them"
            )
    check_launched()
