"""A number of bytes for what a fused model keeps, in loops that do not say when a step begins or ends."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qlora_lite.compute.devices import on_cpu
from qlora_lite.training.forward.activation_checkpointing import BlockCheckpointing

# Bytes of AdamW's states for each trained value: two in fp32.
STATE_BYTES = 8


def fit_budget(model: nn.Module, dial: BlockCheckpointing, tokens: int, total: Callable[[], Tensor]) -> None:
    """Decides what is kept of a batch if the dial has a number of bytes; does nothing otherwise.

    total: computes the loss of the batch, or another sum over it. The first batch is computed once more for it: one
    forward and backward whose gradients are dropped, with random states as before.
    """
    if isinstance(dial.checkpointing, str) or not torch.is_grad_enabled():
        return
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    is_measured = dial.costs is not None
    with dial.batch(tokens, STATE_BYTES * sum(parameter.numel() for parameter in trained)) as phase:
        if is_measured:
            return
        device = next(model.parameters()).device
        with torch.random.fork_rng([] if on_cpu(device) else [device], device_type=device.type):
            with phase("forward"):
                loss = total()
            with phase("backward"):
                torch.autograd.grad(loss, trained, allow_unused=True)
