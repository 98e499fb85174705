"""How records become examples of a task, and a set of them with its labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from qlora_lite.checks import require
from qlora_lite.data.encoding import Tokenizer
from qlora_lite.data.images.processor import ImageProcessor
from qlora_lite.data.records import RecordEncoder
from qlora_lite.data.shapes import Record, Shape
from qlora_lite.data.tasks.encoding import TaskEncoder
from qlora_lite.data.tasks.examples import TaskExamples
from qlora_lite.data.tasks.shapes import TASK_KEYS, TASK_SHAPES, task_shape_of
from qlora_lite.data.token_arrays import Examples, TokenArrays
from qlora_lite.data.tokenization import DataConfig


@dataclass(frozen=True)
class TaskDataConfig(DataConfig):
    """Settings of records for a task. max_length: each text is truncated to so many tokens, as the tokenizer does it.

    Of the other settings, `learn` and `prompts_too` keep their defaults.
    """

    task: str = "sequence-classification"
    keys: ClassVar[Sequence[str]] = TASK_KEYS

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.task in TASK_SHAPES, f"the task of records must be one of {', '.join(TASK_SHAPES)}", self.task)
        default = self.learn == "answers" and not self.learn_empty_reasoning
        require(default, f"learn chooses tokens to learn, and a {self.task} learns none; leave it out", self.learn)

    def encoder(self, tokenizer: Tokenizer, images: ImageProcessor | None = None) -> RecordEncoder:
        return TaskEncoder(tokenizer, self.max_length, self.date)

    def shape_of(self, record: Record, place: str) -> Shape:
        return task_shape_of(self.task, record, place)

    def cache_settings(self) -> dict[str, object]:
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "skip_bad"}

    def kept(self, arrays: TokenArrays) -> Examples:
        return TaskExamples(arrays)
