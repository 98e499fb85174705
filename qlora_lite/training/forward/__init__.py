"""The forward of a model in training: what it saves for backward, and what it recomputes.

In reading order:

shared_input               layers that read one input, multiplied at once
rotary_embedding           rotary embeddings of queries and keys as one node
fused_forward              forward methods replaced by functions that save less for backward
activation_checkpointing   blocks that are recomputed in backward
embedding_noise            NEFTune: noise on the embeddings of tokens
byte_budget                a number of bytes for what is kept, in other training loops
fuse                       both, and the loss without logits, for other training loops
log_probs                  the log-probability of each label, without the logits
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.training.forward.fuse import fuse_ as fuse_
    from qlora_lite.training.forward.fuse import unfuse_ as unfuse_
    from qlora_lite.training.forward.log_probs import token_log_probs as token_log_probs
    from qlora_lite.training.forward.log_probs import token_statistics as token_statistics

__getattr__, __dir__, __all__ = lazy_names(
    __name__, {"fuse": "fuse_ unfuse_", "log_probs": "token_log_probs token_statistics"}
)
