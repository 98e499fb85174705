"""Records of tasks other than that of a causal language model: labels, preferences, targets, hidden tokens, pairs.

In reading order:

shapes       which keys a record of a task has, and what they mean
encoding     the tokens of its texts, and its answer
examples     examples, read from flat arrays
labels       what is learned: classes and their names, numbers, preferences
config       how records become examples of a task
masking      hides tokens for a masked language model
batching     batches of examples
summary      what a set of records becomes, in numbers
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.data.tasks.batching import task_batches as task_batches
    from qlora_lite.data.tasks.config import TaskDataConfig as TaskDataConfig
    from qlora_lite.data.tasks.labels import Labels as Labels
    from qlora_lite.data.tasks.labels import find_labels as find_labels
    from qlora_lite.data.tasks.masking import Masking as Masking

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "labels": "find_labels Labels",
        "config": "TaskDataConfig",
        "masking": "Masking",
        "batching": "task_batches",
    },
)
