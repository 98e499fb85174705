"""Keeps what is resident near what lives while a model trains on a CPU: between blocks, holes of the heap go back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lite.devices import on_cpu
from qlora_lite.memory.host import LOOSE, TIGHT, HoleLimit
from qlora_lite.surgery import repeated_blocks, replaced_forward


def _checked(limit: HoleLimit, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A block's forward; looks at the process before it, and before its backward."""
    limit.check()
    result = own(*args, **kwargs)
    for value in result if isinstance(result, tuple) else (result,):
        if isinstance(value, Tensor) and value.requires_grad:
            value.register_hook(lambda grad: (limit.check(), None)[1])
            break
    return result


@contextmanager
def holes_limited(model: nn.Module, device: torch.device, kind: str | int) -> Iterator[HoleLimit]:
    """Within the block, a `HoleLimit` is checked before each repeated block's forward and backward.

    kind: of checkpointing; who recomputes nothing ("none") gives memory for time, and the limit is loose.
    On an accelerator, whose memory is not the process's, blocks are left alone. Forward methods are put back after.
    """
    limit = HoleLimit(LOOSE if kind == "none" else TIGHT)
    with ExitStack() as stack:
        for block in repeated_blocks(model) if on_cpu(device) else []:
            stack.enter_context(replaced_forward(block, functools.partial(_checked, limit, block.forward)))
        yield limit
