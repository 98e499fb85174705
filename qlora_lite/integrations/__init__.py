"""Other people's training loops: transformers' Trainer and its relatives, with models that this package adapted.

transformers   Trainer for models of `add_lora_`: checkpoints of adapters only

`training.forward.fuse_` gives a model the forward of `train` in any of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.integrations.transformers import AdapterCheckpoints as AdapterCheckpoints
    from qlora_lite.integrations.transformers import AdapterTrainer as AdapterTrainer

__getattr__, __dir__, __all__ = lazy_names(__name__, {"transformers": "AdapterCheckpoints AdapterTrainer"})
