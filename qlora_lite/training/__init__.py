"""Training: one loop, one step, the optimizer, and checkpoints of a run.

In reading order:

config                     TrainConfig, and the steps of epochs
loop                       train: the training loop
step                       one step: the gradients of its batches and the update
objective/                 the loss that a model is trained with, and checks before the first step
forward/                   what the forward saves for backward and recomputes; `fuse_` for other loops
optim                      the optimizers and the learning rate schedule
evaluation                 held-out batches: their loss and scores, also during training
metrics                    the lines of metrics.jsonl
observers                  what is told of a run: events.jsonl, and observers such as trackers
distributed                data-parallel training in several processes
decisions                  what a run decided in its first steps
run_state                  Run: everything that the next steps depend on, to and from files
run_checkpoints            the checkpoints of a run: written, verified, found, removed
run_folder                 the folder of a run: metrics, adapter, checkpoints, lock
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.training.config import TrainConfig as TrainConfig
    from qlora_lite.training.config import steps_of_epochs as steps_of_epochs
    from qlora_lite.training.evaluation import held_out_scores as held_out_scores
    from qlora_lite.training.loop import TrainResult as TrainResult
    from qlora_lite.training.loop import profile_steps as profile_steps
    from qlora_lite.training.loop import train as train
    from qlora_lite.training.metrics import Evaluation as Evaluation

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "config": "TrainConfig steps_of_epochs",
        "loop": "train TrainResult profile_steps",
        "evaluation": "held_out_scores",
        "metrics": "Evaluation",
    },
)
