"""A run that is proposed for a model, records and a memory: its settings, each with the reason for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_lite.cli.configuration.commented import comment, entry
from qlora_lite.cli.configuration.schema import Setting
from qlora_lite.errors import RehearsalError

if TYPE_CHECKING:
    from qlora_lite.cli.data_options import TrainingData
    from qlora_lite.planning.memory_plan import DeviceMemory

RANK, ALPHA, RATE = 16, 32.0, 2e-4
# Examples of a step: the largest power of two with which an epoch has some steps.
MOST_EXAMPLES, FEWEST_STEPS = 16, 25
# Held out are a share, of records that are enough for it, and no more than tell the loss.
SHARE, FEWEST_RECORDS, MOST_HELD_OUT = 0.1, 20, 500
EVALUATIONS = 8
# Longer rows are not proposed, unless asked for.
MOST_TOKENS = 4096
HEADING = (
    "# Written by qlora-lite init; `qlora-lite train FILE` starts the run. A key is",
    "# an option of train, and a flag behind FILE has precedence. `qlora-lite train",
    "# FILE --print-config` shows all other settings.",
)


@dataclass(frozen=True)
class Shape:
    """The batches of a run, and the reason for them. predicted: bytes of the device; None if it was not possible."""

    rows: int
    gradient_accumulation: int
    max_length: int
    checkpointing: str
    reason: str
    predicted: int | None


def examples_of_step(examples: int) -> int:
    """Returns how many examples a step has: a power of two, so that an epoch has at least `FEWEST_STEPS` steps."""
    most = max(2, min(MOST_EXAMPLES, examples // FEWEST_STEPS))
    return 1 << (most.bit_length() - 1)


def shape_within(model: str, memory: DeviceMemory, examples: int, longest: int, why_not: str | None) -> Shape:
    """Returns the batches that fit into a memory, for examples of up to `longest` tokens.

    why_not: why training cannot be predicted; None if it can. Raises ConfigError if nothing fits.
    """
    from qlora_lite.lora.config import LoraConfig
    from qlora_lite.memory.report import readable_bytes
    from qlora_lite.planning.batch_choice import choose_batch
    from qlora_lite.planning.forecast import TrainingSetup
    from qlora_lite.quantization.config import QuantConfig

    wanted = examples_of_step(examples)
    if why_not is None:
        try:
            setup = TrainingSetup(QuantConfig(), LoraConfig(RANK, ALPHA), wanted, longest)
            found = choose_batch(model, setup, memory)
            size, needed = readable_bytes(memory.size), readable_bytes(found.needed)
            reason = f"{found.rows} x {found.tokens} tokens are predicted to need at most {needed} of {size}."
            budget = found.checkpointing if isinstance(found.checkpointing, str) else f"{found.checkpointing >> 20}MiB"
            accumulated = found.gradient_accumulation
            return Shape(found.rows, accumulated, found.tokens, budget, reason, found.needed)
        except RehearsalError as error:
            why_not = str(error)
    reason = f"The memory was not predicted: {why_not}. A batch of one row is the safest."
    return Shape(1, wanted, longest, "full", reason, None)


def held_out_share(records: int) -> float | None:
    """Returns the share of the records to hold out; None for too few."""
    return None if records < FEWEST_RECORDS else round(min(SHARE, MOST_HELD_OUT / records), 4)


def steps_of(examples: int, epochs: float, shape: Shape) -> int:
    """Returns the steps of a run over these examples."""
    return math.ceil(epochs * math.ceil(examples / shape.rows) / shape.gradient_accumulation)


def proposed(answers: Mapping[str, Any], data: TrainingData, shape: Shape, longest: int) -> dict[str, tuple[Any, str]]:
    """Returns the settings of the run by name, each with the reason for it.

    answers: model, task, data, epochs and output. longest: the tokens that nearly all examples have at most.
    """
    trained = len(data.examples)
    share, passes, output = answers["eval_share"], answers["epochs"], str(answers["output"])
    steps = steps_of(trained, passes, shape)
    every = max(1, steps // EVALUATIONS)
    step = shape.rows * shape.gradient_accumulation
    cut = "so nearly all stay whole" if shape.max_length >= longest else "and longer ones than this are shortened"
    found: dict[str, tuple[Any, str]] = {
        "model": (answers["model"], "The base. It stays frozen, and is packed while it is read."),
        **({} if answers["task"] is None else {"task": (answers["task"], "What the model is made for.")}),
        "format": ("nf4", "4 bits a weight, as in QLoRA. int8 is more exact and takes twice the bytes."),
        "rank": (RANK, "Capacity of the adapters: 8 for a narrow task, 64 for much new knowledge."),
        "alpha": (ALPHA, "The update is scaled by alpha / rank; twice the rank is usual."),
        "target_modules": ("all-linear", "Adapting all linear layers learns more than attention alone."),
        "data": (answers["data"], f"{trained:,} examples to train on."),
        "max_length": (shape.max_length, f"99 % of the examples have at most {longest:,} tokens, {cut}."),
        "epochs": (
            int(passes) if passes == int(passes) else passes,
            f"{passes:g} pass{'' if passes == 1 else 'es'} over the examples: {steps:,} steps.",
        ),
        "batch_size": (shape.rows, shape.reason),
        "gradient_accumulation": (
            shape.gradient_accumulation,
            f"{step} examples make a step: more are a steadier gradient, and fewer steps.",
        ),
        "checkpointing": (shape.checkpointing, "The least recomputation that fits."),
        "learning_rate": (RATE, "Usual for LoRA. Halve it if the loss jumps."),
        "schedule": ("cosine", "Falls to 0, so that the last steps are small."),
        "warmup_ratio": (0.03, "The first steps have small learning rates, as the states of AdamW are still empty."),
    }
    if share is not None and data.held_out is not None:
        found["eval_share"] = (share, f"{len(data.held_out):,} examples judge the run, and are not trained on.")
        found["eval_steps"] = (every, "The adapter with the lowest held-out loss is kept in best_adapter.")
    found["output"] = (output, "Adapter, metrics, checkpoints and all settings go there.")
    found["save_steps"] = (every, f"`qlora-lite train {output} --resume` goes on from the newest checkpoint.")
    return found


def as_file(settings: Mapping[str, Setting], found: Mapping[str, tuple[Any, str]]) -> str:
    """Returns the configuration file of the settings with their reasons, in the order of the sections."""
    parts, section = ["\n".join(HEADING) + "\n"], ""
    for name, setting in settings.items():
        if name in found:
            value, reason = found[name]
            parts.append("\n" if setting.section != section else "")
            section = setting.section
            parts.append(comment(reason) + entry(setting, value))
    return "".join(parts)
