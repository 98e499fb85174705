"""`qlora-lite train`: trains adapters on records of files and data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from qlora_lite.cli.configuration.command import Configuration, PrintConfig, PrintSchema
from qlora_lite.cli.data_options import (
    Fields,
    Learn,
    LearnEmptyReasoning,
    Limit,
    MaxLength,
    SkipBad,
    TokenCache,
    data_config,
    described_records,
    input_paths,
)
from qlora_lite.cli.options import (
    Alpha,
    AnyBase,
    BaseIn,
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
    settings,
    skipped,
)
from qlora_lite.cli.training.first_adapter import adapters_of_run, check_layers, chosen_layers
from qlora_lite.cli.training.run_figures import figures
from qlora_lite.cli.training.run_options import (
    BatchSize,
    BestBy,
    Bias,
    Data,
    Dropout,
    Epochs,
    EvalData,
    EvalGenerate,
    EvalShare,
    EvalSteps,
    ExcludeModules,
    FromAdapter,
    GradientAccumulation,
    InitLoraWeights,
    KeepBest,
    KeepLast,
    LayersToTransform,
    LearningRate,
    LoraPlusRatio,
    MaxGradNorm,
    MemoryBudget,
    MinLearningRate,
    ModulesToSave,
    NeftuneNoiseAlpha,
    OptionalCheckpointing,
    Packing,
    Patience,
    Regression,
    Resume,
    SaveSteps,
    Schedule,
    Seed,
    Shard,
    Steps,
    TargetModules,
    Track,
    TrainableTokenIndices,
    Variant,
    WarmupRatio,
    WarmupSteps,
    WeightDecay,
)
from qlora_lite.cli.training.run_settings import check_options, train_config, with_epochs
from qlora_lite.cli.training.task_records import (
    exact_match_of,
    held_out_batches,
    prepare_for_labels_,
    run_batches,
    task_with_records,
)
from qlora_lite.errors import ConfigError
from qlora_lite.quantization.formats import DEFAULT_FORMAT, UNPACKED

if TYPE_CHECKING:
    from qlora_lite.cli.data_options import TrainingData
    from qlora_lite.data.tasks.labels import Labels
    from qlora_lite.lora.config import LoraConfig
    from qlora_lite.planning.memory_budget import BudgetedConfig
    from qlora_lite.quantization.config import QuantConfig
    from qlora_lite.training.config import TrainConfig


@dataclass(frozen=True)
class _Settings:
    """What the options ask for, checked, before anything is read. lora: of the adapter that the run goes on from."""

    quant: QuantConfig
    lora: LoraConfig
    train: TrainConfig

    @classmethod
    def of(cls, ctx: typer.Context) -> _Settings:
        """Raises ConfigError for settings that are wrong, or contradict one another."""
        from qlora_lite.quantization.config import QuantConfig

        quant = settings(QuantConfig, ctx.params, skip_modules=skipped(ctx.params["skip_modules"]))
        lora = adapters_of_run(ctx)
        made = cls(quant, lora, train_config(ctx))
        data_config(ctx.params)
        check_options(lora, ctx.params)
        return made


def _check_run(options: Mapping[str, Any], inputs: Sequence[Path]) -> None:
    """Raises CheckpointError if the run cannot be written, or an adapter that it goes on from has another base.

    Sizes and samples of the base are compared here, all its bytes once it is loaded. inputs: the records.
    """
    from qlora_lite.checkpoints.atomic_folder import check_output_is_not_input
    from qlora_lite.checkpoints.base_identity import check_trained_on_checkpoint
    from qlora_lite.checkpoints.hub import checkpoint_folder
    from qlora_lite.cli.configuration.commented import check_of_a_run
    from qlora_lite.training.distributed import is_first_process
    from qlora_lite.training.run_checkpoints import ADAPTER_FOLDER, DATA_FILE, METRICS_FILE, RUN_FILE

    model, output, first = options["model"], options["output"], options["from_adapter"]
    own = [output / ADAPTER_FOLDER] if options["resume"] else []
    for adapter in [*own, *([] if first is None else [first])] if not options["any_base"] else []:
        check_trained_on_checkpoint(adapter, checkpoint_folder(model))
    if not is_first_process():  # the first one may have begun to write
        return
    for name in (METRICS_FILE, DATA_FILE, RUN_FILE):
        check_output_is_not_input(output / name, *inputs)
    if first is not None:
        check_output_is_not_input(output, first)
    check_of_a_run(output / RUN_FILE)
    replaced = options["overwrite"] or options["resume"]
    check_output(output / ADAPTER_FOLDER if replaced else output, replaced, model, *map(str, inputs))


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


def _go_on_from_(model: Any, ctx: typer.Context) -> None:
    """Puts the adapter of --from-adapter onto the model; prints what was unexpected in the checkpoint, and its size."""
    from qlora_lite.lora.peft.save_load import load_adapter_
    from qlora_lite.training.distributed import is_first_process

    folder = ctx.params["from_adapter"]
    chosen = chosen_layers(ctx, model)
    loaded = load_adapter_(model, folder, any_base=ctx.params["any_base"])
    check_layers(chosen, loaded, folder)
    if is_first_process():
        print("\n".join([*model.load_report.in_words(), f"{len(loaded)} layers go on from {folder}"]))


def _adapted_model(ctx: typer.Context, chosen: _Settings, labels: Labels | None, pad_token_id: int) -> Any:
    """Returns the packed base with the adapters to train. labels: of the records, if the task has some."""
    import torch

    from qlora_lite.checkpoints.load import load_quantized

    given = {name: ctx.params[name] for name in ("ignore_unexpected", "text_only", "task", "shard")}
    torch.manual_seed(chosen.train.seed)
    names = None if labels is None else labels.for_model
    model = load_quantized(ctx.params["model"], chosen.quant, **given, labels=names, base=ctx.params["base_in"])
    if labels is not None:
        prepare_for_labels_(model, labels, pad_token_id)
    if ctx.params["from_adapter"] is None:
        _add_adapters_(model, chosen.lora)
    else:
        _go_on_from_(model, ctx)
    return model


def _within_budget(options: Mapping[str, Any], chosen: _Settings, records: TrainingData) -> BudgetedConfig | None:
    """Returns the settings of the run that --memory-budget allows, which are printed; None without the option.

    Raises ConfigError for records with images, whose memory in the vision tower is not predicted.
    """
    from qlora_lite.checks import byte_count
    from qlora_lite.planning.memory_budget import config_within, device_memory

    if options["memory_budget"] is None:
        return None
    if records.examples.has_images:
        raise ConfigError(
            "--memory-budget predicts rows of text, and the records have images, whose features take memory too; "
            "leave it out, and choose --checkpointing"
        )
    memory = device_memory(byte_count("--memory-budget must be", options["memory_budget"]))
    tokens = options["max_length"] if options["packing"] else records.tokenized.longest
    shape: dict[str, Any] = {"rows": options["batch_size"], "tokens": tokens, "text_only": options["text_only"]}
    shape["base"] = options["base_in"]
    found = config_within(memory, options["model"], chosen.quant, chosen.lora, chosen.train, **shape)
    print(found.described())
    return found


def train(
    ctx: typer.Context,
    configuration: Configuration = None,
    *,
    model: Model,
    task: TaskName = None,
    text_only: TextOnly = False,
    ignore_unexpected: IgnoreUnexpected = False,
    base_in: BaseIn = "memory",
    format: Format = DEFAULT_FORMAT,
    blocksize: Blocksize = 64,
    double_quant: DoubleQuant = True,
    embedding_format: EmbeddingFormat = UNPACKED,
    skip_modules: SkipModules = None,
    int8_activations: Int8Activations = False,
    from_adapter: FromAdapter = None,
    any_base: AnyBase = False,
    rank: Rank = 16,
    alpha: Alpha = 32.0,
    use_rslora: UseRslora = False,
    variant: Variant = "lora",
    init_lora_weights: InitLoraWeights = "normal",
    dropout: Dropout = 0.0,
    target_modules: TargetModules = "all-linear",
    exclude_modules: ExcludeModules = None,
    layers_to_transform: LayersToTransform = None,
    modules_to_save: ModulesToSave = "",
    bias: Bias = "none",
    trainable_token_indices: TrainableTokenIndices = "",
    data: Data,
    field: Fields = None,
    limit: Limit = None,
    skip_bad: SkipBad = 0,
    regression: Regression = False,
    learn: Learn = "answers",
    learn_empty_reasoning: LearnEmptyReasoning = False,
    max_length: MaxLength = 512,
    packing: Packing = False,
    token_cache: TokenCache = True,
    steps: Steps = None,
    epochs: Epochs = None,
    learning_rate: LearningRate = 2e-4,
    schedule: Schedule = "cosine",
    warmup_steps: WarmupSteps = 0,
    warmup_ratio: WarmupRatio = 0.0,
    min_learning_rate: MinLearningRate = 0.0,
    weight_decay: WeightDecay = 0.0,
    max_grad_norm: MaxGradNorm = "1.0",
    lora_plus_ratio: LoraPlusRatio = 1.0,
    neftune_noise_alpha: NeftuneNoiseAlpha = None,
    batch_size: BatchSize = 2,
    gradient_accumulation: GradientAccumulation = 1,
    optimizer: Optimizer = "adamw",
    checkpointing: OptionalCheckpointing = None,
    memory_budget: MemoryBudget = None,
    shard: Shard = False,
    seed: Seed = 0,
    eval_data: EvalData = None,
    eval_share: EvalShare = None,
    eval_steps: EvalSteps = None,
    patience: Patience = None,
    best_by: BestBy = "loss",
    eval_generate: EvalGenerate = None,
    output: Output,
    save_steps: SaveSteps = None,
    keep_last: KeepLast = "2",
    keep_best: KeepBest = 0,
    track: Track = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
    print_config: PrintConfig = False,
    print_schema: PrintSchema = False,
) -> None:
    """Train adapters on records; writes metrics.jsonl, data.json, run.yaml and adapter/ into the output folder."""
    from qlora_lite.checkpoints.hub import load_tokenizer
    from qlora_lite.cli.configuration.commented import run_as_file
    from qlora_lite.integrations.trackers import open_trackers
    from qlora_lite.signals import deferred_signals
    from qlora_lite.training.distributed import is_first_process
    from qlora_lite.training.loop import train as train_model

    chosen = _Settings.of(ctx)
    if print_config:
        print(run_as_file(ctx, is_kept=False), end="")
        return
    _check_run(ctx.params, input_paths([*data, *(eval_data or ())]))
    trackers = open_trackers(track or (), output)
    own_task = task_with_records(ctx.params)
    tokenizer = load_tokenizer(model)
    records, labels, notes = described_records(ctx.params, tokenizer, own_task)
    chosen = replace(chosen, train=with_epochs(chosen.train, records, ctx.params))
    evaluate = exact_match_of(records.held_out, ctx.params, tokenizer)
    stream = run_batches(records.examples, labels, ctx.params, tokenizer, seed, images=records.images)
    with deferred_signals():
        budgeted = _within_budget(ctx.params, chosen, records)
        loaded = _adapted_model(ctx, chosen, labels, tokenizer.pad_token_id)
        held_out = held_out_batches(records.held_out, labels, ctx.params, tokenizer, records.images)
        folder: dict[str, Any] = {"output_dir": output, "overwrite": overwrite, "resume": resume, "notes": notes}
        folder |= {"settings": run_as_file(ctx, is_kept=True), "observers": trackers}
        config = chosen.train if budgeted is None else budgeted.config
        result = train_model(loaded, stream, config, eval_batches=held_out, evaluate=evaluate, **folder)
    if is_first_process():
        told = figures(result, records, chosen.train, budgeted, output)
        finish({name: value for name, value in told.items() if json or value is not None}, json)
