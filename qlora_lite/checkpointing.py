"""Activation checkpointing: keep the input of each block, compute the rest again in backward (arXiv:1604.06174)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora_lite.errors import ConfigError


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: the children of its outermost ModuleLists."""
    blocks: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                blocks.extend(child)
            else:
                visit(child)

    visit(model)
    return blocks


@contextmanager
def checkpointed(model: nn.Module, kind: str) -> Iterator[None]:
    """Within the block, `kind="full"` makes every repeated block of the model recompute itself in backward.

    Non-reentrant, so a frozen embedding (an input without gradient) is no obstacle. Forward methods are put back
    afterwards. ConfigError when the model has no ModuleList of blocks.
    """
    blocks = repeated_blocks(model) if kind == "full" else []
    if kind == "full" and not blocks:
        raise ConfigError("checkpointing='full' needs blocks in an nn.ModuleList; this model has none: use 'none'")
    originals: list[tuple[nn.Module, Any]] = [(block, block.__dict__.get("forward")) for block in blocks]
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block, original in originals:
            if original is None:
                del block.forward
            else:
                block.forward = original
