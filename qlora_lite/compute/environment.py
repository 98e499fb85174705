"""Versions of the libraries and facts about the machine, which a run depends on besides its settings."""

from __future__ import annotations

import functools
import platform
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch

from qlora_lite.compute.devices import cpu_multiplies_bf16
from qlora_lite.system import missing

PACKAGES = ("qlora-lite", "torch", "bitsandbytes", "accelerate", "safetensors", "transformers", "peft")


@functools.cache
def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment() -> dict[str, object]:
    """Returns versions by package (None if not installed), cores, memory, accelerator, bf16 support, missing things.

    memory_bytes: of the machine, used or free. missing: of what only some systems have (system.py).
    """
    figures: dict[str, object] = {"python": platform.python_version()}
    figures |= {package: _version_of(package) for package in PACKAGES}
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    figures["cores"] = psutil.cpu_count()
    figures["memory_bytes"] = psutil.virtual_memory().total
    figures["accelerator"] = str(accelerator) if accelerator else "none"
    figures["cpu_multiplies_bf16"] = cpu_multiplies_bf16()
    figures["missing"] = missing()
    return figures


def arithmetic(device: torch.device) -> dict[str, object]:
    """Returns what the last bits of a result depend on besides settings and data: versions, threads, processor."""
    packages = ("qlora-lite", "torch", "bitsandbytes", "transformers")
    return {
        **{package: _version_of(package) for package in packages},
        "threads": torch.get_num_threads(),
        "device": str(device.type),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cpu_multiplies_bf16": cpu_multiplies_bf16(),
    }
