"""torch's own record of every allocation on an accelerator, as a file for the viewer at pytorch.org/memory_viz."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qlora_lite.errors import CheckpointError, ConfigError

# Allocations that are remembered; a step of a large model has some ten thousand.
MOST_ENTRIES = 1_000_000


def _recorder() -> Any:
    """The module that records (torch.cuda.memory). ConfigError where there is no such device."""
    if not torch.cuda.is_available():
        raise ConfigError(
            "a snapshot of allocations is made by torch for CUDA devices, and there is none here; leave it out"
        )
    return torch.cuda.memory


@contextmanager
def memory_snapshot(path: Path) -> Iterator[None]:
    """Records the allocations within the block, with their stacks, and writes them to `path` at its end, error or not.

    An out-of-memory is what one wants to look at. ConfigError without a CUDA device, CheckpointError for a path that
    exists or cannot be written; both before anything is run.
    """
    recorder = _recorder()
    if path.exists():
        raise CheckpointError(f"{path} exists; name a file that does not")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise CheckpointError(f"{path.parent} is no folder that can be written to; name another place for the snapshot")
    recorder._record_memory_history(max_entries=MOST_ENTRIES)
    try:
        yield
    finally:
        recorder._dump_snapshot(str(path))
        recorder._record_memory_history(enabled=None)
