"""`qlora-lite train`: adapters on a JSONL file. Heavy imports stand inside the command, for quick help."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_lite.cli.options import (
    Alpha,
    AnyBase,
    Blocksize,
    DoubleQuant,
    EmbeddingFormat,
    Format,
    Int8Activations,
    Json,
    Model,
    Output,
    Overwrite,
    Rank,
    RankStabilized,
    check_output,
    finish,
    listed,
    listed_tokens,
)
from qlora_lite.cli.plan import chosen_checkpointing


def _is_first_process() -> bool:
    """Whether this is the one of a run's processes that writes and says (torchrun and accelerate launch set RANK)."""
    return os.environ.get("RANK", "0") == "0"


def _check_init(init: str) -> None:
    from qlora_lite.errors import ConfigError
    from qlora_lite.lora.config import init_parts

    if init_parts(init)[1] > 1:
        raise ConfigError(f"init {init!r} packs the base anew, and this command writes no base; use it from Python")


def _check_run(output: Path, replaced: bool, model: str, data: Path, same_base: bool) -> None:
    """same_base: whether a run there must have been on this base; all bytes of that are compared once it is loaded."""
    from qlora_lite.checkpoints.atomic_folder import check_output_is_not_input
    from qlora_lite.checkpoints.base_identity import check_trained_on_checkpoint
    from qlora_lite.checkpoints.hub import checkpoint_folder
    from qlora_lite.training.run_checkpoints import ADAPTER_FOLDER, METRICS_FILE

    if same_base:
        check_trained_on_checkpoint(output / ADAPTER_FOLDER, checkpoint_folder(model))
    if not _is_first_process():  # the first one may have begun to write
        return
    check_output_is_not_input(output / METRICS_FILE, data)
    check_output(output / ADAPTER_FOLDER if replaced else output, replaced, model, data)


def _target_settings(targets: str, exclude: str | None, layers: str | None) -> dict[str, Any]:
    from qlora_lite.lora.targets import layer_numbers

    named = {"target_modules": targets, "exclude_modules": exclude}
    lists: dict[str, Any] = {setting: listed(text) for setting, text in named.items() if text is not None}
    every = {"target_modules": targets} if targets == "all-linear" else {}
    return {**lists, **every, "layers_to_transform": None if layers is None else layer_numbers(layers)}


def _train_figures(result: Any, tokenized: Any, output: Path, predicted: int | None) -> dict[str, Any]:
    foreseen = {} if predicted is None else {"predicted_peak_bytes": predicted}
    return {
        "examples": len(tokenized.examples),
        "examples_shortened": tokenized.truncated,
        "examples_dropped": tokenized.dropped,
        "first_loss": result.losses[0],
        "last_loss": result.losses[-1],
        "seconds": round(result.seconds, 1),
        "peak_bytes": result.steps[-1].peak_bytes,
        **foreseen,
        "own_loss_because": result.own_loss_because,
        "batches_halved_from_step": result.halved_at,
        "adapter": str(output / "adapter"),
    }


def train(
    model: Model,
    data: Annotated[Path, typer.Option("--data", help="JSONL with messages, prompt/completion, instruction or text.")],
    output: Output,
    format: Format = "nf4",
    blocksize: Blocksize = 64,
    double_quant: DoubleQuant = True,
    embedding_format: EmbeddingFormat = "none",
    int8_activations: Int8Activations = False,
    rank: Rank = 16,
    alpha: Alpha = 32.0,
    use_rslora: RankStabilized = False,
    variant: Annotated[str, typer.Option(help="lora, or a variant of it, such as dora.")] = "lora",
    init_lora_weights: Annotated[
        str, typer.Option(help="normal, kaiming, gaussian, orthogonal, pissa or loftq.")
    ] = "normal",
    dropout: Annotated[float, typer.Option(help="Dropout on the adapters' input.")] = 0.0,
    target_modules: Annotated[str, typer.Option(help="all-linear, or layer names with commas.")] = "all-linear",
    exclude_modules: Annotated[str | None, typer.Option(help="Layer names with commas that get no adapters.")] = None,
    layers_to_transform: Annotated[
        str | None, typer.Option(help="Numbers of the blocks that get adapters: 0-7,12.")
    ] = None,
    modules_to_save: Annotated[str, typer.Option(help="Modules to train whole, with commas: norm,lm_head.")] = "",
    bias: Annotated[str, typer.Option(help="Biases to train: none, lora_only (of adapted layers) or all.")] = "none",
    trainable_token_indices: Annotated[
        str, typer.Option(help="Tokens whose embedding is trained, with commas: 50001,50002.")
    ] = "",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 100,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-4,
    lora_plus_ratio: Annotated[float, typer.Option(help="LoRA+: B learns at so many times A's rate.")] = 1.0,
    warmup_steps: Annotated[int, typer.Option(help="Steps of linear warm-up.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 2,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches of a step.")] = 1,
    max_length: Annotated[int, typer.Option(help="Longer examples are cut to it.")] = 512,
    packing: Annotated[bool, typer.Option(help="Put several examples into a row.")] = False,
    completion_only: Annotated[bool, typer.Option(help="Learn the answers only, or all tokens.")] = True,
    optimizer: Annotated[str, typer.Option(help="adamw or adamw8bit.")] = "adamw",
    checkpointing: Annotated[
        str | None, typer.Option(help="full (recompute blocks, the default), none (keep all), 300MiB (what fits).")
    ] = None,
    memory_budget: Annotated[
        str | None, typer.Option(help="Recompute as little as fits into 20GiB, ..., by prediction.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of data order, adapters and dropout.")] = 0,
    save_steps: Annotated[int | None, typer.Option(help="Write a checkpoint after so many steps.")] = None,
    keep_last: Annotated[int, typer.Option(help="Newest checkpoints to keep.")] = 2,
    keep_best: Annotated[int, typer.Option(help="Of the older ones, those of the lowest loss to keep.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the output folder's newest sound checkpoint, if it has one.")
    ] = False,
    any_base: AnyBase = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Train adapters on a JSONL file; writes metrics.jsonl and adapter/ into the output folder."""
    from dataclasses import replace

    import torch

    from qlora_lite.checkpoints.hub import load_tokenizer
    from qlora_lite.checkpoints.load import load_quantized
    from qlora_lite.data.batching import batches
    from qlora_lite.data.records import read_records
    from qlora_lite.data.tokenization import tokenize_all
    from qlora_lite.lora.adapters import add_lora_
    from qlora_lite.lora.config import LoraConfig
    from qlora_lite.planning.forecast import Wanted
    from qlora_lite.quantization.config import QuantConfig
    from qlora_lite.signals import stoppable
    from qlora_lite.training.config import TrainConfig
    from qlora_lite.training.loop import train as train_model

    quant = QuantConfig(
        format, blocksize, double_quant, int8_activations=int8_activations, embedding_format=embedding_format
    )
    chosen = _target_settings(target_modules, exclude_modules, layers_to_transform)
    beside: Any = {
        "modules_to_save": listed(modules_to_save),
        "bias": bias,
        "trainable_token_indices": listed_tokens(trainable_token_indices),
    }
    lora = LoraConfig(
        rank,
        alpha,
        dropout,
        use_rslora=use_rslora,
        init_lora_weights=init_lora_weights,
        variant=variant,
        **chosen,
        **beside,
    )
    _check_init(init_lora_weights)
    config = TrainConfig(
        steps=steps,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        lora_plus_ratio=lora_plus_ratio,
        gradient_accumulation=gradient_accumulation,
        optimizer=optimizer,
        seed=seed,
        save_steps=save_steps,
        keep_last=keep_last,
        keep_best=keep_best,
    )
    _check_run(output, overwrite or resume, model, data, same_base=resume and not any_base)
    records = read_records(data)
    tokenizer = load_tokenizer(model)
    tokenized = tokenize_all(records, tokenizer, max_length, completion_only)
    longest = max_length if packing else max(len(example.input_ids) for example in tokenized.examples)
    wanted = Wanted(quant, lora, batch_size, longest, optimizer, accumulated=gradient_accumulation > 1)
    padding = tokenizer.pad_token_id
    stream = batches(tokenized.examples, batch_size, seed, pad_token_id=padding, packing=packing, max_length=max_length)
    with stoppable():
        dial, predicted = chosen_checkpointing(memory_budget, checkpointing, model, wanted)
        torch.manual_seed(seed)
        loaded = load_quantized(model, quant)
        add_lora_(loaded, lora)
        config = replace(config, checkpointing=dial)
        result = train_model(loaded, stream, config, output_dir=output, overwrite=overwrite, resume=resume)
    if _is_first_process():
        finish(_train_figures(result, tokenized, output, predicted), json)
