"""Options of the commands that let a model answer, and the model that they load, with its adapters."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_lite.cli.options import settings, skipped
from qlora_lite.errors import CheckpointError, ConfigError, listing

if TYPE_CHECKING:
    from qlora_lite.generation.settings import GenerationSettings

Temperature = Annotated[
    float | None,
    typer.Option(
        help="0 takes the likeliest token each time; above 0, tokens are drawn, the higher the more freely. Default: "
        "what the model's generation config says."
    ),
]
TopP = Annotated[
    float | None, typer.Option(help="Draw among the likeliest tokens that have this share of the probability, as 0.9.")
]
TopK = Annotated[int | None, typer.Option(help="Draw among this number of likeliest tokens.")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(help="Tokens of an answer at most. Default: 512, or half of the model's positions if fewer."),
]
DecodeCopies = Annotated[
    bool,
    typer.Option(
        "--decode-copies",
        help="Hold copies of 4-bit codes, with which a CPU with AVX512-BF16 answers faster. They take 0.53 bytes a "
        "value, about as much as the packed weights; the bytes are told on stderr.",
    ),
]
# A run's folder says more than the name that all of them have for the adapter in it.
COMMON_NAME = "adapter"
OFF = "off"


@dataclass(frozen=True)
class Talker:
    """A loaded model that answers. adapters: their names, in the order of the command line; the first is in use."""

    model: Any
    tokenizer: Any
    adapters: tuple[str, ...]


def named_adapters(given: Sequence[str] | None) -> dict[str, Path]:
    """Returns {name: folder} for options such as `out/run/adapter` (named `run`) and `polite=out/run/adapter`.

    Raises ConfigError for two of one name, and CheckpointError for a folder that does not exist.
    """
    from qlora_lite.checkpoints.files import did_you_mean

    named: dict[str, Path] = {}
    for text in given or ():
        name, equals, folder = text.partition("=")
        if not equals or os.path.exists(text) or not re.fullmatch(r"[\w-]+", name):
            name, folder = _name_of(Path(text)), text
        if not Path(folder).is_dir():
            hint = did_you_mean(folder, os.path.isdir) if not os.path.exists(folder) else ""
            raise CheckpointError(f"{folder} is not a folder; name that of an adapter{hint}")
        if name in named or name == OFF:
            why = "means no adapter" if name == OFF else f"names {named[name]} already"
            raise ConfigError(f"--adapter {text}: {name!r} {why}; name it otherwise, as --adapter second={folder}")
        named[name] = Path(folder)
    return named


def _name_of(folder: Path) -> str:
    whole = Path(os.path.abspath(folder))
    name = whole.parent.name if whole.name == COMMON_NAME else whole.name
    return re.sub(r"[^\w-]+", "-", name) or COMMON_NAME


def generation_settings(options: Mapping[str, Any], model: str) -> GenerationSettings:
    """Returns the settings of the options. Without --max-new-tokens: 512, or half of the model's positions."""
    from qlora_lite.checkpoints.hub import checkpoint_folder, read_config
    from qlora_lite.generation.settings import DEFAULT_NEW_TOKENS, GenerationSettings
    from qlora_lite.positions import longest_sequence

    longest = options["max_new_tokens"]
    made = settings(GenerationSettings, options, max_new_tokens=DEFAULT_NEW_TOKENS if longest is None else longest)
    if longest is not None:
        return made
    positions = longest_sequence(read_config(checkpoint_folder(model, weights=False)))
    most = DEFAULT_NEW_TOKENS if positions is None else max(1, min(DEFAULT_NEW_TOKENS, positions // 2))
    return replace(made, max_new_tokens=most)


def load_talker(options: Mapping[str, Any]) -> Talker:
    """Loads the model and the adapters of the options of a command. What is particular about it is told on stderr."""
    from qlora_lite.checkpoints.base_identity import check_trained_on_checkpoint
    from qlora_lite.checkpoints.hub import checkpoint_folder, load_tokenizer
    from qlora_lite.checkpoints.load import check_base, load_quantized
    from qlora_lite.generation.answering import check_answers
    from qlora_lite.lora.multi_adapter import use_adapter_
    from qlora_lite.lora.peft.options import CONFIG_FILE, read_supported_config
    from qlora_lite.lora.peft.save_load import load_adapter_
    from qlora_lite.quantization.config import QuantConfig
    from qlora_lite.signals import deferred_signals

    check_base(options["base_in"])
    given = options["adapter"]
    adapters = named_adapters([given] if isinstance(given, str) else given)
    quant = settings(QuantConfig, options, skip_modules=skipped(options["skip_modules"]))
    _check_model(options["model"])
    checkpoint = checkpoint_folder(options["model"])
    for folder in adapters.values():  # before the model is loaded
        read_supported_config(folder / CONFIG_FILE)
        if not options["any_base"]:
            check_trained_on_checkpoint(folder, checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    with deferred_signals():
        model = load_quantized(
            checkpoint,
            quant,
            ignore_unexpected=options["ignore_unexpected"],
            text_only=options["text_only"],
            base=options["base_in"],
        )
        for name, folder in adapters.items():
            load_adapter_(model, folder, name=name, any_base=options["any_base"])
        if adapters:
            use_adapter_(model, next(iter(adapters)))
    check_answers(model)
    if lines := model.load_report.in_words():
        print("\n".join(lines), file=sys.stderr)
    return Talker(model.eval(), tokenizer, tuple(adapters))


@contextmanager
def held_copies(model: Any, is_wanted: bool) -> Iterator[None]:
    """Holds `decode_copies` of a model within the block, if they are wanted, and tells their bytes on stderr.

    Raises ConfigError if no weight can have one.
    """
    from qlora_lite.generation.repacked_codes import decode_copies
    from qlora_lite.memory.report import readable_bytes

    if not is_wanted:
        yield
        return
    with decode_copies(model) as taken:
        if not taken:
            raise ConfigError(
                "--decode-copies makes copies of 4-bit weights, on a CPU with AVX512-BF16, and this model or machine "
                "has none; leave it out"
            )
        print(f"copies of codes: {readable_bytes(taken)}", file=sys.stderr)
        yield


def _check_model(model: str) -> None:
    """Raises ConfigError, before weights are read, for a model of a task that writes no answers."""
    from qlora_lite.checkpoints.hub import checkpoint_folder, read_config, task_for
    from qlora_lite.generation.answering import writes_answers

    config = read_config(checkpoint_folder(model, weights=False))
    task = task_for(config)
    if not writes_answers(task, config):
        raise ConfigError(f"{model} is made for {task.name}; only causal language models write answers here")


def adapters_in_words(names: Sequence[str], used: str | None) -> str:
    """Returns the names of adapters as one line, that in use with a star."""
    return listing((f"{name}*" if name == (used or OFF) else name for name in (*names, OFF)), len(names) + 1)
