"""The Modelfile of ollama: from which files it makes a model, and where answers end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_lite.checkpoints.files import sync

MODELFILE = "Modelfile"
# Parameters of ollama, by the names in a generation config.
SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


def stop_texts(generation: Any, tokens: Sequence[str]) -> list[str]:
    """Returns the texts that end an answer by a generation config. tokens: by their ids."""
    ids = getattr(generation, "eos_token_id", None)
    numbers = [number for number in (ids if isinstance(ids, list) else [ids]) if isinstance(number, int)]
    strings = getattr(generation, "stop_strings", None) or []
    found = [tokens[number] for number in numbers if 0 <= number < len(tokens)]
    return list(dict.fromkeys([*found, *([strings] if isinstance(strings, str) else strings)]))


def sampling(generation: Any) -> dict[str, float]:
    """Returns ollama's parameters of sampling that a generation config sets; none if it does not sample."""
    if not getattr(generation, "do_sample", None):
        return {}
    values = {name: getattr(generation, key, None) for key, name in SAMPLING.items()}
    return {name: value for name, value in values.items() if value is not None}


def model_modelfile(file: str, stops: Sequence[str], parameters: Mapping[str, float]) -> str:
    """Returns the Modelfile of a model; ollama reads the chat template from its file."""
    lines = [f"FROM ./{file}", *(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops)]
    return "\n".join([*lines, *(f"PARAMETER {name} {value:g}" for name, value in parameters.items())]) + "\n"


def adapter_modelfile(file: str, base: str | Path) -> str:
    """Returns the Modelfile of an adapter. base: the folder of the checkpoint that it was trained on."""
    return (
        "# The base that the adapter was trained on: a folder, a GGUF file, or a model that ollama has.\n"
        f"FROM {base}\nADAPTER ./{file}\n"
    )


def write_modelfile(folder: Path, text: str) -> None:
    """Writes a Modelfile, the same bytes on every system, and flushes it to the disk."""
    (folder / MODELFILE).write_text(text, encoding="utf-8", newline="\n")
    sync(folder / MODELFILE)
