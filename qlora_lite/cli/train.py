"""`qlora-lite train`: trains adapters on records of files and data sets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_lite.cli.data_options import (
    SOURCES_HELP,
    Fields,
    Learn,
    LearnEmptyReasoning,
    Limit,
    MaxLength,
    SkipBad,
    TokenCache,
    TrainingData,
    described_records,
    input_paths,
)
from qlora_lite.cli.options import (
    Alpha,
    AnyBase,
    Blocksize,
    DoubleQuant,
    EmbeddingFormat,
    Format,
    IgnoreUnexpected,
    Int8Activations,
    Json,
    Model,
    Optimizer,
    Output,
    Overwrite,
    Rank,
    SkipModules,
    TaskName,
    TextOnly,
    UseRslora,
    check_output,
    finish,
    listed,
    listed_tokens,
    settings,
    skipped,
    targets_named,
)
from qlora_lite.cli.records.task_records import (
    Scores,
    prepare_for_labels_,
    run_batches,
    scores_in_figures,
    scores_of_held_out,
    task_with_records,
)
from qlora_lite.errors import ConfigError
from qlora_lite.quantization.formats import DEFAULT_FORMAT, UNPACKED

if TYPE_CHECKING:
    from torch import nn

    from qlora_lite.data.tasks.labels import Labels
    from qlora_lite.lora.config import LoraConfig
    from qlora_lite.planning.memory_budget import BudgetedConfig
    from qlora_lite.training.loop import TrainResult


LARGEST_EXPONENT = 700.0  # of a perplexity that is a finite float


def _lora_config(options: Mapping[str, Any]) -> LoraConfig:
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


def _check_options(lora: LoraConfig, memory_budget: str | None, checkpointing: str | None) -> None:
    from qlora_lite.lora.config import parse_init

    if parse_init(lora.init_lora_weights)[1] > 1:
        raise ConfigError(
            f"init {lora.init_lora_weights!r} packs the base anew, and this command writes no base; use it from Python"
        )
    if memory_budget is not None and checkpointing is not None:
        raise ConfigError("--memory-budget chooses the checkpointing itself; leave out it or --checkpointing")


def _check_run(output: Path, replaced: bool, model: str, data: Sequence[Path], same_base: bool) -> None:
    """Raises CheckpointError if the run cannot be written there.

    same_base: an adapter of an earlier run in `output` must belong to this base. Sizes and samples of the base are
    compared here, all its bytes once it is loaded.
    """
    from qlora_lite.checkpoints.atomic_folder import check_output_is_not_input
    from qlora_lite.checkpoints.base_identity import check_trained_on_checkpoint
    from qlora_lite.checkpoints.hub import checkpoint_folder
    from qlora_lite.training.distributed import is_first_process
    from qlora_lite.training.run_checkpoints import ADAPTER_FOLDER, DATA_FILE, METRICS_FILE

    if same_base:
        check_trained_on_checkpoint(output / ADAPTER_FOLDER, checkpoint_folder(model))
    if not is_first_process():  # the first one may have begun to write
        return
    for name in (METRICS_FILE, DATA_FILE):
        check_output_is_not_input(output / name, *data)
    check_output(output / ADAPTER_FOLDER if replaced else output, replaced, model, *map(str, data))


def _add_adapters_(model: Any, lora: LoraConfig) -> None:
    """Adds adapters; prints what stays unpacked or gets no adapter, what peft will not load, and unexpected tensors."""
    from qlora_lite.lora.adapters import add_lora_, lora_layers
    from qlora_lite.lora.peft.save_load import layers_lost_in_peft
    from qlora_lite.lora.targets import left_out_of_all_linear
    from qlora_lite.surgery import described_by_pattern, tower_names
    from qlora_lite.training.distributed import is_first_process

    lines: list[str] = model.load_report.in_words()
    left = left_out_of_all_linear(model, lora.target_modules)
    lines += [f"{len(left)} layers get no adapter:"] * bool(left)
    lines += [f"  {line}" for line in described_by_pattern(left, tower_names(model))]
    if lines and is_first_process():
        print("\n".join(lines))
    add_lora_(model, lora)
    if (lost := layers_lost_in_peft(model, lora_layers(model))) and is_first_process():
        print("\n".join(lost))


def _note_held_out(model: nn.Module, result: TrainResult, scores: Sequence[Scores], output: Path) -> None:
    """Writes the loss of the held-out examples, before and after the run, to the model card of the adapter."""
    from qlora_lite.lora.peft.card import update_adapter_card
    from qlora_lite.training.run_checkpoints import ADAPTER_FOLDER
    from qlora_lite.training.run_state import training_record

    if scores:
        before, after = (own["loss"] or 0.0 for own in scores)
        update_adapter_card(model, output / ADAPTER_FOLDER, training_record(result.steps, (before, after)))


def _figures(
    result: TrainResult,
    data: TrainingData,
    labels: Labels | None,
    scores: list[Scores],
    budgeted: BudgetedConfig | None,
    output: Path,
) -> dict[str, object]:
    """The figures of a run. scores: of the held-out examples, before and after it."""
    predicted = {} if budgeted is None else {"predicted_peak_bytes": budgeted.predicted_peak}
    of_held_out: dict[str, object] = {}
    if data.held_out is not None:
        of_held_out["examples_held_out"] = len(data.held_out)
        of_held_out |= scores_in_figures(scores)
        if labels is None:
            losses = {when: own["loss"] or 0.0 for when, own in zip(("before", "after"), scores, strict=True)}
            of_held_out |= {
                f"perplexity_{when}": math.exp(min(loss, LARGEST_EXPONENT)) for when, loss in losses.items()
            }
    return {
        "examples": len(data.examples),
        "examples_shortened": data.tokenized.truncated,
        "examples_dropped": data.tokenized.dropped,
        "conversations_split": data.tokenized.split,
        "bad_records_skipped": data.tokenized.skipped,
        **of_held_out,
        "first_loss": result.losses[0],
        "last_loss": result.losses[-1],
        "seconds": round(result.seconds, 1),
        "peak_bytes": result.steps[-1].peak_bytes,
        **predicted,
        "logits_reason": result.logits_reason,
        "batches_halved_from_step": result.halved_at,
        "adapter": str(output / "adapter"),
    }


def train(
    ctx: typer.Context,
    model: Model,
    data: Annotated[list[str], typer.Option("--data", help=SOURCES_HELP)],
    output: Output,
    task: TaskName = None,
    regression: Annotated[
        bool, typer.Option("--regression", help="Labels are numbers to predict, not classes, also whole ones.")
    ] = False,
    format: Format = DEFAULT_FORMAT,
    blocksize: Blocksize = 64,
    double_quant: DoubleQuant = True,
    embedding_format: EmbeddingFormat = UNPACKED,
    skip_modules: SkipModules = None,
    int8_activations: Int8Activations = False,
    rank: Rank = 16,
    alpha: Alpha = 32.0,
    use_rslora: UseRslora = False,
    variant: Annotated[str, typer.Option(help="lora, or a variant of it, such as dora.")] = "lora",
    init_lora_weights: Annotated[
        str, typer.Option(help="Start of A and B: normal, kaiming, gaussian, orthogonal, pissa or loftq.")
    ] = "normal",
    dropout: Annotated[float, typer.Option(help="Dropout probability on the input of the adapters.")] = 0.0,
    target_modules: Annotated[
        str,
        typer.Option(
            help="Layers that get adapters: all-linear (of the language model), all-linear-with-towers (also of a "
            "vision tower), names or their last parts separated by commas, or re: and a regular expression for the "
            "whole name, as re:.*layers.[0-3].*q_proj."
        ),
    ] = "all-linear",
    exclude_modules: Annotated[
        str | None,
        typer.Option(
            help="Layers of these that get no adapter: any parts of their names separated by commas, as vision_tower, "
            "or re: and a regular expression."
        ),
    ] = None,
    layers_to_transform: Annotated[
        str | None,
        typer.Option(help="Numbers of the blocks that get adapters, as 0-7,12. Default: all blocks."),
    ] = None,
    modules_to_save: Annotated[
        str, typer.Option(help="Modules that are trained themselves, without adapters: norm,lm_head.")
    ] = "",
    bias: Annotated[str, typer.Option(help="Biases to train: none, lora_only (of adapted layers) or all.")] = "none",
    trainable_token_indices: Annotated[
        str, typer.Option(help="Token ids whose embeddings are trained: 50001,50002.")
    ] = "",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 100,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate, reached after the warm-up.")] = 2e-4,
    lora_plus_ratio: Annotated[
        float, typer.Option(help="LoRA+: learning rate of B divided by the learning rate of A.")
    ] = 1.0,
    warmup_steps: Annotated[int, typer.Option(help="Steps of linear warm-up of the learning rate.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 2,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches of a step.")] = 1,
    field: Fields = None,
    limit: Limit = None,
    skip_bad: SkipBad = 0,
    learn: Learn = "answers",
    learn_empty_reasoning: LearnEmptyReasoning = False,
    token_cache: TokenCache = True,
    eval_data: Annotated[
        list[str] | None,
        typer.Option("--eval-data", help="Records that are not trained on: their loss is computed before and after."),
    ] = None,
    eval_share: Annotated[
        float | None,
        typer.Option(help="Share of the records of --data that is held out in this way. Equal records stay together."),
    ] = None,
    max_length: MaxLength = 512,
    packing: Annotated[bool, typer.Option(help="Put several examples into one row of up to --max-length tokens.")] = (
        False
    ),
    optimizer: Optimizer = "adamw",
    checkpointing: Annotated[
        str | None,
        typer.Option(
            help="Activation checkpointing: full recomputes all blocks in backward, none recomputes no block, and a "
            "size such as 300MiB limits the bytes above those of the model. Default: full."
        ),
    ] = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(help="Choose --checkpointing by prediction: the least that fits into this memory, as 20GiB."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of data order, adapters and dropout.")] = 0,
    save_steps: Annotated[
        int | None, typer.Option(help="Steps between two checkpoints. Default: one when a signal stops the run.")
    ] = None,
    keep_last: Annotated[int, typer.Option(help="Number of newest checkpoints to keep.")] = 2,
    keep_best: Annotated[int, typer.Option(help="Number of older checkpoints to keep, those of the lowest loss.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest intact checkpoint in the output folder, if any.")
    ] = False,
    any_base: AnyBase = False,
    ignore_unexpected: IgnoreUnexpected = False,
    text_only: TextOnly = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Train adapters on records; writes metrics.jsonl, data.json and adapter/ into the output folder."""
    import torch

    from qlora_lite.checkpoints.hub import load_tokenizer
    from qlora_lite.checkpoints.load import load_quantized
    from qlora_lite.checks import byte_count
    from qlora_lite.planning.memory_budget import config_within, device_memory
    from qlora_lite.quantization.config import QuantConfig
    from qlora_lite.signals import deferred_signals
    from qlora_lite.training.config import TrainConfig, checkpointing_named
    from qlora_lite.training.distributed import is_first_process
    from qlora_lite.training.loop import train as train_model

    quant = settings(QuantConfig, ctx.params, skip_modules=skipped(skip_modules))
    lora = _lora_config(ctx.params)
    config = settings(TrainConfig, ctx.params, checkpointing=checkpointing_named(checkpointing or "full"))
    _check_options(lora, memory_budget, checkpointing)
    inputs = input_paths([*data, *(eval_data or ())])
    _check_run(output, overwrite or resume, model, inputs, same_base=resume and not any_base)
    own_task = task_with_records(ctx.params)
    tokenizer = load_tokenizer(model)
    records, labels, notes = described_records(ctx.params, tokenizer, own_task)
    stream = run_batches(records.examples, labels, ctx.params, tokenizer, seed, images=records.images)
    budgeted = None
    with deferred_signals():
        if memory_budget is not None:
            memory = device_memory(byte_count("--memory-budget must be", memory_budget))
            tokens = max_length if packing else records.tokenized.longest
            shape: dict[str, int] = {"rows": batch_size, "tokens": tokens}
            budgeted = config_within(memory, model, quant, lora, config, text_only=text_only, **shape)
            print(budgeted.described())
        torch.manual_seed(seed)
        names = None if labels is None else labels.for_model
        loaded = load_quantized(
            model, quant, ignore_unexpected=ignore_unexpected, text_only=text_only, task=task, labels=names
        )
        if labels is not None:
            prepare_for_labels_(loaded, labels, tokenizer.pad_token_id)
        _add_adapters_(loaded, lora)
        chosen = config if budgeted is None else budgeted.config
        scores = scores_of_held_out(loaded, records.held_out, labels, ctx.params, tokenizer, records.images)
        result = train_model(loaded, stream, chosen, output_dir=output, overwrite=overwrite, resume=resume, notes=notes)
        scores += scores_of_held_out(loaded, records.held_out, labels, ctx.params, tokenizer, records.images)
    if is_first_process():
        _note_held_out(loaded, result, scores, output)
        finish(_figures(result, records, labels, scores, budgeted, output), json)
