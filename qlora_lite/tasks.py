"""Tasks: what a model is made for, and the classes of transformers and peft that belong to each.

A task decides on the class that a checkpoint is loaded as, on the loss, and on the modules that are trained whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from qlora_lite import architecture
from qlora_lite.errors import ConfigError
from qlora_lite.surgery import is_below

POOLER = "pooler"


@dataclass(frozen=True)
class Task:
    """A task, by the name that `load_quantized` takes.

    auto_class: the class of transformers that makes its models. suffix: of the names of their classes; None if these
    end in many ways. peft_type: `task_type` in peft's files; None if peft has none. has_labels: whether a head that
    computes a score for each label is put on the base model.
    """

    name: str
    auto_class: str
    suffix: str | None = None
    peft_type: str | None = None
    has_labels: bool = False


CAUSAL_LM = Task("causal-lm", "AutoModelForCausalLM", "ForCausalLM", "CAUSAL_LM")
SEQ2SEQ_LM = Task("seq2seq-lm", "AutoModelForSeq2SeqLM", None, "SEQ_2_SEQ_LM")
IMAGE_TEXT_TO_TEXT = Task("image-text-to-text", "AutoModelForImageTextToText", None, "CAUSAL_LM")
SEQUENCE_CLASSIFICATION = Task(
    "sequence-classification", "AutoModelForSequenceClassification", "ForSequenceClassification", "SEQ_CLS", True
)
TOKEN_CLASSIFICATION = Task(
    "token-classification", "AutoModelForTokenClassification", "ForTokenClassification", "TOKEN_CLS", True
)
MASKED_LM = Task("masked-lm", "AutoModelForMaskedLM", "ForMaskedLM")
EMBEDDING = Task("embedding", "AutoModel", None, "FEATURE_EXTRACTION")

# In the order in which the class that a checkpoint names is looked up: some classes belong to several tasks.
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(CAUSAL_LM, SEQ2SEQ_LM, IMAGE_TEXT_TO_TEXT, SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION, MASKED_LM),
        EMBEDDING,
    )
}


def task_named(name: str) -> Task:
    """Returns the task of this name. Raises ConfigError for any other name."""
    if name not in TASKS:
        raise ConfigError(f"task must be one of {', '.join(TASKS)}, or a class of transformers; got {name!r}")
    return TASKS[name]


def task_of(model: nn.Module) -> Task:
    """Returns the task of a model, from its class and its parts.

    Vision-language models come as `causal-lm`, since they are trained with the same loss.
    """
    name = type(model).__name__
    for task in TASKS.values():
        if task.suffix is not None and name.endswith(task.suffix):
            return task
    if name.endswith("Model") and architecture.output_head(model) is None:
        return EMBEDDING
    is_encoder_decoder = architecture.config_value(getattr(model, "config", None), "is_encoder_decoder")
    return SEQ2SEQ_LM if is_encoder_decoder else CAUSAL_LM


def label_head(model: nn.Module) -> list[str]:
    """Returns the names of the modules that compute the scores of the labels; none for a task without labels."""
    if not task_of(model).has_labels:
        return []
    base = architecture.base_model(model)
    return [name for name, part in model.named_children() if part is not base and any(True for _ in part.parameters())]


def in_label_head(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Returns those of these names of modules or tensors that belong to the head of the labels."""
    heads = label_head(model)
    return {name for name in names if is_below(name, heads)}


def creatable(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Returns those of these parameters that a checkpoint may lack, because transformers starts them untrained.

    They are the head of the labels, and the pooler of an encoder that was trained to fill in masked tokens.
    """
    names = set(names)
    if not task_of(model).has_labels and task_of(model) is not EMBEDDING:
        return set()
    return in_label_head(model, names) | {name for name in names if POOLER in name.split(".")}


def trained_whole(model: nn.Module) -> list[str]:
    """Returns the modules that have to be trained whole for the model's task: the head of its labels, and what is new.

    An untrained pooler lies between a classifier's head and its base.
    """
    heads = label_head(model)
    report = getattr(model, "load_report", None)
    owners = {name.rpartition(".")[0] for name in getattr(report, "created", ()) if heads}
    return [*heads, *sorted(owners - in_label_head(model, owners))]
