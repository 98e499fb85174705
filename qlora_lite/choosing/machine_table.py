"""The choices of this machine: remembered in the cache folder, measured where they are not, and the user's own.

`<cache>/choices/<machine>.json` holds the times of all alternatives, in a file for each processor, number of threads
and set of library versions. A file that is damaged, or says another machine, is measured again and replaced. It is
written as a whole, so that two processes at once leave the table of one of them. Without a folder that can be written,
each process measures for itself.

`QLORA_LITE_CHOICES` overrides: `default` measures nothing and takes the defaults, `attention_forward=torch` is a choice
of the user; several stand with commas between them.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from qlora_lite.checkpoints.base_identity import json_hash
from qlora_lite.checkpoints.files import new_file, read_json
from qlora_lite.checks import is_finite
from qlora_lite.choices import DEFAULTS, NAMES, Choices, with_overrides
from qlora_lite.choosing.measure import Seconds, fastest_of_all, measure
from qlora_lite.compute.cpu_attention import DTYPE_NAMES
from qlora_lite.compute.devices import on_cpu
from qlora_lite.compute.environment import arithmetic
from qlora_lite.errors import CheckpointError
from qlora_lite.system import processor, user_cache

VARIABLE = "QLORA_LITE_CHOICES"
DEFAULT = "default"
VERSION = 1


def machine() -> dict[str, object]:
    """Returns what the times depend on: the processor, the number of threads, and versions of the libraries."""
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return {"processor": processor(), "amx": bool(amx()), **arithmetic(torch.device("cpu"))}


def table_file() -> Path:
    """Returns the file of this machine's times, whether or not it exists."""
    return user_cache() / "choices" / f"{json_hash(machine())[:16]}.json"


def _is_table(found: Mapping[str, Any]) -> bool:
    """Whether a parsed file has times of this machine, for all alternatives of each of its keys."""
    seconds = found.get("seconds")
    if found.get("version") != VERSION or found.get("machine") != machine() or not isinstance(seconds, dict):
        return False
    return all(
        key in NAMES
        and isinstance(times, dict)
        and tuple(times) == NAMES[key]
        and all(is_finite(time) and time > 0 for time in times.values())
        for key, times in seconds.items()
    )


def _remembered() -> dict[str, Mapping[str, float]]:
    """Returns the times of the file; none if it is missing, damaged or foreign."""
    try:
        found = read_json(table_file())
    except CheckpointError:
        return {}
    return dict(found["seconds"]) if _is_table(found) else {}


def _remember(seconds: Seconds) -> None:
    plain = {"version": VERSION, "machine": machine(), "seconds": {**_remembered(), **seconds}}
    # A folder that cannot be written costs a measurement for each process.
    with suppress(CheckpointError), new_file(table_file(), overwrite=True) as file:
        file.write(json.dumps(plain, indent=2).encode())


def _is_of(key: str, dtype: str) -> bool:
    """Whether a key is chosen for models in a dtype."""
    return f".{dtype}." in key or "." not in key


@functools.cache
def _times(dtype: str, file: Path, threads: int) -> Seconds:
    """Returns the times for a dtype, remembered or measured now; none on a busy machine.

    file, threads: what they depend on.
    """
    found = {key: times for key, times in _remembered().items() if _is_of(key, dtype)}
    if any(key not in found for key in NAMES if _is_of(key, dtype)):
        found = dict(measure(dtype) or {})
        if found:
            _remember(found)
    return found


def machine_times(dtype: str) -> Seconds:
    """Returns the seconds of the alternatives for a dtype, `bf16` or `fp32`, by key; none on a busy machine.

    Measures for one or two seconds at most, if this was not measured before.
    """
    return _times(dtype, table_file(), torch.get_num_threads())


def _words() -> list[str]:
    return [word.strip() for word in os.environ.get(VARIABLE, "").split(",")]


def machine_choices(dtype: str) -> Choices:
    """Returns the choices for a dtype, `bf16` or `fp32`: the user's, else the fastest on this machine.

    Raises ConfigError if the user's are not known.
    """
    own = ",".join(word for word in _words() if word != DEFAULT)
    with_overrides(DEFAULTS, own)  # a mistake is told before anything is measured
    return with_overrides(DEFAULTS if DEFAULT in _words() else fastest_of_all(machine_times(dtype)), own)


def described_choices() -> dict[str, str]:
    """Returns the choice for each key with the times behind it: `torch (3.52 ms; large_products 11.10 ms)`."""
    described = {}
    for dtype in DTYPE_NAMES.values():
        choices = machine_choices(dtype)
        seconds = {} if DEFAULT in _words() else machine_times(dtype)
        for key in (key for key in NAMES if _is_of(key, dtype)):
            own = {name: f"{1e3 * seconds[key][name]:.2f} ms" for name in NAMES[key]} if key in seconds else {}
            others = [f"{name} {own[name]}" for name in own if name != choices[key]]
            described[key] = choices[key] + (f" ({'; '.join([own[choices[key]], *others])})" if own else "")
    return described


def described_timing() -> str:
    """Returns in a line whether the choices come from times of this machine, and why not if they do not."""
    if DEFAULT in _words():
        return f"no, {VARIABLE} asks for the defaults"
    missing = [dtype for dtype in DTYPE_NAMES.values() if not machine_times(dtype)]
    if missing:
        which = " and ".join(missing)
        return f"not for {which}: the machine was busy, so these are the defaults; the next start times them again"
    return "yes, on this machine"


def device_choices(device: torch.device, dtype: torch.dtype) -> Choices:
    """Returns the choices for a model in this dtype on a device: those of the machine on a CPU, else the defaults."""
    name = DTYPE_NAMES.get(dtype)
    return machine_choices(name) if name is not None and on_cpu(device) else DEFAULTS
