"""Training: one loop, one step, the optimizer, and checkpoints of a run.

In reading order:

config                     TrainConfig
objective                  which loss a model is trained with
fused_forward              modules exchanged for autograd functions that keep less
activation_checkpointing   which blocks are recomputed in backward
optim                      optimizers and the learning rate
distributed                several processes on one run
step                       one step: gradients and update
progress                   what is printed while training runs
run_state                  the state of a run between two steps, in files
run_checkpoints            checkpoints of a run, whole or absent
run_folder                 metrics, adapter and checkpoints of a run
loop                       train
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.training.config import TrainConfig as TrainConfig
    from qlora_lite.training.loop import TrainResult as TrainResult
    from qlora_lite.training.loop import profile_steps as profile_steps
    from qlora_lite.training.loop import train as train

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "config": "TrainConfig",
        "loop": "train TrainResult profile_steps",
    },
)
