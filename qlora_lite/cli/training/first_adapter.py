"""The adapter that a run goes on from: its settings, and the options of the run that contradict them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from qlora_lite.cli.options import was_given
from qlora_lite.cli.training.run_settings import lora_config
from qlora_lite.errors import CheckpointError, ConfigError, TargetError, listing

if TYPE_CHECKING:
    from qlora_lite.lora.config import LoraConfig

# Settings with a value of the adapter that an option may repeat.
REPEATABLE = (
    *("rank", "alpha", "dropout", "use_rslora", "variant", "bias"),
    *("modules_to_save", "trainable_token_indices"),
)
# Those that choose layers; the layers are compared, because there are many ways to name the same ones.
CHOOSING = ("target_modules", "exclude_modules", "layers_to_transform")
START = "init_lora_weights"


def lora_config_of_adapter(folder: Path) -> LoraConfig:
    """Returns the settings of an adapter on disk. Raises CheckpointError for a folder that holds none.

    target_modules: the names that its configuration has, stacks of experts among them.
    """
    from qlora_lite.lora.peft.options import CONFIG_FILE, lora_config, read_supported_config, target_parameters

    path = folder / CONFIG_FILE
    options = read_supported_config(path)
    config, targets = lora_config(options, path), options.get("target_modules")
    if isinstance(targets, list):
        config = replace(config, target_modules=[*targets, *target_parameters(options, path)])
    elif isinstance(targets, str) and targets:
        config = replace(config, target_modules=targets)
    tokens = options.get("trainable_token_indices")
    if isinstance(tokens, dict):  # by the name of the embedding
        tokens = next(iter(tokens.values()), None)
    try:
        return replace(
            config,
            bias=str(options.get("bias") or "none"),
            modules_to_save=_names(options.get("modules_to_save")),
            trainable_token_indices=_names(tokens),
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _names(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else ()


def adapters_of_run(ctx: typer.Context) -> LoraConfig:
    """Returns the settings of the adapters: those of the options, or of --from-adapter.

    Raises ConfigError, listing them, for options that the adapter contradicts. Layers are compared when the model is
    loaded (`check_layers`).
    """
    folder, asked = ctx.params["from_adapter"], lora_config(ctx.params)
    if folder is None:
        return asked
    own = lora_config_of_adapter(folder)
    problems = list(_contradictions(ctx, asked, own))
    if problems:
        raise ConfigError(f"{folder} {listing(problems, len(problems), ', ')}; leave out what contradicts the adapter")
    return own


def _contradictions(ctx: typer.Context, asked: LoraConfig, own: LoraConfig) -> Iterator[str]:
    """Yields what the adapter has, for each option that was given and asks for something else."""
    for name in REPEATABLE:
        wanted, has = _comparable(getattr(asked, name)), _comparable(getattr(own, name))
        if was_given(ctx, name) and wanted != has:
            option = f"--{name.replace('_', '-')}"
            yield f"has {name} {_shown(has)}, not {_shown(wanted)} ({option})"
    if was_given(ctx, START) and ctx.params[START] != "normal":
        yield f"has values for A and B, so that --init-lora-weights {ctx.params[START]} has nothing to start"


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return listing(value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def chosen_layers(ctx: typer.Context, model: Any) -> set[str] | None:
    """Returns the layers that the options choose of a model without adapters; None if they choose none by name."""
    from qlora_lite.lora.targets import select_targets

    if not any(was_given(ctx, name) and ctx.params[name] is not None for name in CHOOSING):
        return None
    return {layer.name for layer in select_targets(model, lora_config(ctx.params))}


def check_layers(chosen: set[str] | None, loaded: Sequence[str], folder: Path) -> None:
    """Raises TargetError if the options chose other layers than the adapter has."""
    if chosen is None or chosen == set(loaded):
        return
    only, others = sorted(chosen - set(loaded)), sorted(set(loaded) - chosen)
    parts = [f"not {listing(only, 3)}"] * bool(only) + [f"also {listing(others, 3)}"] * bool(others)
    raise TargetError(
        f"{folder} adapts other layers than --target-modules, --exclude-modules and --layers-to-transform choose: "
        f"{', and '.join(parts)}; leave out these options"
    )
