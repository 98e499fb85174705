"""Writes torch's record of every allocation on a CUDA device, as a file for the viewer at pytorch.org/memory_viz."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

from qlora_lite.errors import CheckpointError, ConfigError

# The number of allocations that torch remembers. A step of a large model makes some ten thousand.
MAX_ENTRIES = 1_000_000


def _recorder() -> ModuleType:
    """Returns the torch module whose private functions record allocations and write them to a file."""
    if not torch.cuda.is_available():
        raise ConfigError(
            "torch records snapshots of allocations on CUDA devices only, and none is available; leave the snapshot out"
        )
    return torch.cuda.memory


@contextmanager
def memory_snapshot(path: Path) -> Iterator[None]:
    """Records the allocations of the block with their stacks, and writes them to `path` at its end.

    The file is written after an error too, since an out-of-memory is worth looking at.
    Raises ConfigError without a CUDA device, and CheckpointError for a path that exists or cannot be written, both
    before the block runs.
    """
    recorder = _recorder()
    if path.exists():
        raise CheckpointError(f"{path} exists; name a file that does not exist")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise CheckpointError(f"{path.parent} is not a writable folder; name another path for the snapshot")
    recorder._record_memory_history(max_entries=MAX_ENTRIES)
    try:
        yield
    finally:
        recorder._dump_snapshot(str(path))
        recorder._record_memory_history(enabled=None)
