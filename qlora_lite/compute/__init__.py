"""Autograd functions that keep little for backward, the loss, devices, and host memory.

In reading order:

devices             which device computes, and whether its CPU multiplies bf16
slicing             work on a few rows at a time
recompute           tensors recomputed in backward, saved by other nodes, or stashed for recomputation
lora_linear         y = x W0^T + scaling (x A^T) B^T, one autograd function for a dense or packed W0
weight_update       scaling B A added to a weight, in tiles
norms_and_gates     RMSNorm and gated activations that keep only their inputs
cpu_attention       causal attention on a CPU, as large products
cross_entropy       the loss of a linear head without its logits
token_log_probs     the log-probability of each label under a linear head without its logits
host_memory         freed heap pages, and limits on what libraries cache
random_state        the state of every random number generator of a run
environment         versions of the libraries, and the machine

The room products/ multiplies by a frozen weight, dense or packed, and masks rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.compute.cpu_attention import causal_attention as causal_attention
    from qlora_lite.compute.cross_entropy import IGNORE_INDEX as IGNORE_INDEX
    from qlora_lite.compute.cross_entropy import linear_cross_entropy as linear_cross_entropy
    from qlora_lite.compute.host_memory import release_freed_pages as release_freed_pages
    from qlora_lite.compute.host_memory import set_host_limits as set_host_limits
    from qlora_lite.compute.lora_linear import adapted_linear as adapted_linear
    from qlora_lite.compute.norms_and_gates import gated as gated
    from qlora_lite.compute.norms_and_gates import rms_norm as rms_norm
    from qlora_lite.compute.token_log_probs import linear_log_probs as linear_log_probs

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "cross_entropy": "linear_cross_entropy IGNORE_INDEX",
        "lora_linear": "adapted_linear",
        "norms_and_gates": "rms_norm gated",
        "cpu_attention": "causal_attention",
        "token_log_probs": "linear_log_probs",
        "host_memory": "set_host_limits release_freed_pages",
    },
)
