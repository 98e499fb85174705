"""`qlora-lite train`: trains adapters on records of files and data sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from qlora_lite.cli.data_options import (
    Fields,
    Learn,
    LearnEmptyReasoning,
    Limit,
    MaxLength,
    SkipBad,
    TokenCache,
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
    settings,
    skipped,
)
from qlora_lite.cli.training.run_figures import figures
from qlora_lite.cli.training.run_options import (
    BatchSize,
    Bias,
    Data,
    Dropout,
    Epochs,
    EvalData,
    EvalGenerate,
    EvalShare,
    EvalSteps,
    ExcludeModules,
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
    Steps,
    TargetModules,
    TrainableTokenIndices,
    Variant,
    WarmupRatio,
    WarmupSteps,
    WeightDecay,
)
from qlora_lite.cli.training.run_settings import check_options, lora_config, train_config, with_epochs
from qlora_lite.cli.training.task_records import (
    exact_match_of,
    held_out_batches,
    prepare_for_labels_,
    run_batches,
    task_with_records,
)
from qlora_lite.quantization.formats import DEFAULT_FORMAT, UNPACKED

if TYPE_CHECKING:
    from qlora_lite.lora.config import LoraConfig


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


def train(
    ctx: typer.Context,
    model: Model,
    data: Data,
    output: Output,
    task: TaskName = None,
    regression: Regression = False,
    format: Format = DEFAULT_FORMAT,
    blocksize: Blocksize = 64,
    double_quant: DoubleQuant = True,
    embedding_format: EmbeddingFormat = UNPACKED,
    skip_modules: SkipModules = None,
    int8_activations: Int8Activations = False,
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
    field: Fields = None,
    limit: Limit = None,
    skip_bad: SkipBad = 0,
    learn: Learn = "answers",
    learn_empty_reasoning: LearnEmptyReasoning = False,
    token_cache: TokenCache = True,
    eval_data: EvalData = None,
    eval_share: EvalShare = None,
    eval_steps: EvalSteps = None,
    patience: Patience = None,
    eval_generate: EvalGenerate = None,
    max_length: MaxLength = 512,
    packing: Packing = False,
    optimizer: Optimizer = "adamw",
    checkpointing: OptionalCheckpointing = None,
    memory_budget: MemoryBudget = None,
    seed: Seed = 0,
    save_steps: SaveSteps = None,
    keep_last: KeepLast = "2",
    keep_best: KeepBest = 0,
    resume: Resume = False,
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
    from qlora_lite.training.distributed import is_first_process
    from qlora_lite.training.loop import train as train_model

    quant = settings(QuantConfig, ctx.params, skip_modules=skipped(skip_modules))
    lora = lora_config(ctx.params)
    config = train_config(ctx)
    check_options(lora, ctx.params)
    inputs = input_paths([*data, *(eval_data or ())])
    _check_run(output, overwrite or resume, model, inputs, same_base=resume and not any_base)
    own_task = task_with_records(ctx.params)
    tokenizer = load_tokenizer(model)
    records, labels, notes = described_records(ctx.params, tokenizer, own_task)
    config = with_epochs(config, records, ctx.params)
    evaluate = exact_match_of(records.held_out, labels, ctx.params, tokenizer)
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
        held_out = held_out_batches(records.held_out, labels, ctx.params, tokenizer, records.images)
        folder: dict[str, Any] = {"output_dir": output, "overwrite": overwrite, "resume": resume, "notes": notes}
        result = train_model(loaded, stream, chosen, eval_batches=held_out, evaluate=evaluate, **folder)
    if is_first_process():
        finish(figures(result, records, config, budgeted, output), json)
