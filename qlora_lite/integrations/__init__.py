"""Other people's training loops and adapters, on packed bases.

transformers     Trainer for models of `add_lora_`: checkpoints of adapters only
peft_merging     merging in the layers that follow
peft_linear      peft's LoRA layer around a packed linear layer
peft_embedding   peft's LoRA layer around a packed embedding
peft_experts     peft's LoRA layer around a module of experts with packed stacks
peft_config      configurations of peft for packed models
peft             peft's own API, on packed layers
trackers         TensorBoard, Weights & Biases, Trackio and MLflow, told of a run by `train`
trl              trl's trainers, under their names: `from qlora_lite.integrations.trl import SFTTrainer`

`training.forward.fuse_` gives a model the forward of `train` in any of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.integrations.peft import get_peft_model as get_peft_model
    from qlora_lite.integrations.peft import load_peft_model as load_peft_model
    from qlora_lite.integrations.peft import lora_config as lora_config
    from qlora_lite.integrations.peft import prepare_ as prepare_
    from qlora_lite.integrations.trackers import open_trackers as open_trackers
    from qlora_lite.integrations.transformers import AdapterCheckpoints as AdapterCheckpoints
    from qlora_lite.integrations.transformers import AdapterTrainer as AdapterTrainer

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "trackers": "open_trackers",
        "transformers": "AdapterCheckpoints AdapterTrainer",
        "peft": "get_peft_model lora_config load_peft_model prepare_",
    },
)
