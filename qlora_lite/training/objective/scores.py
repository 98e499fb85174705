"""How good the answers of a model are on held-out examples: scores besides the loss, by task.

classes, words       accuracy, and F1 as the mean over classes (macro)
several classes      the share of examples whose classes are all right, and F1 as the mean over classes
numbers              Pearson's correlation, and the mean squared error
preferences          the share of pairs whose chosen text has the higher reward
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.data.batching import Batch
from qlora_lite.signals import check_signals
from qlora_lite.training.objective.task_losses import TaskLoss

# Losses of tokens, of which there are too many kinds for a mean over them.
OF_TOKENS = ("targets", "hidden tokens")


def macro_f1(decided: Tensor, labels: Tensor) -> float:
    """Returns the mean of F1 = 2 tp / (2 tp + fp + fn) of the classes that occur among answers or labels."""
    classes = torch.cat([decided, labels]).unique()
    right = torch.stack([((decided == name) & (labels == name)).sum() for name in classes])
    seen = torch.stack([(decided == name).sum() + (labels == name).sum() for name in classes])
    return float((2 * right / seen).mean())


def pearson(found: Tensor, expected: Tensor) -> float | None:
    """Returns Pearson's correlation; None if one side is constant, so that there is none."""
    found, expected = found.double() - found.double().mean(), expected.double() - expected.double().mean()
    norm = float(found.norm() * expected.norm())
    return float(found @ expected) / norm if norm > 0 else None


def scores(name: str, decided: Tensor, labels: Tensor) -> dict[str, float | None]:
    """Returns the scores of the answers of all examples. name: of the task's loss (task_losses.py)."""
    if name == "numbers":
        return {"pearson": pearson(decided, labels), "mse": float((decided - labels).double().square().mean())}
    if name == "similar texts":
        return {"recall_at_1": float((decided == 1).double().mean())}
    if name == "preferences":
        return {"accuracy": float((decided == 1).double().mean())}
    if name == "several classes":
        by_class = [2 * (own & true).sum() / (own.sum() + true.sum()) for own, true in _classes_in(decided, labels)]
        f1 = float(torch.stack(by_class).mean()) if by_class else None
        return {"accuracy": float((decided == labels).all(-1).double().mean()), "f1": f1}
    decided, labels = decided.flatten(), labels.flatten()
    is_labelled = labels != IGNORE_INDEX
    decided, labels = decided[is_labelled], labels[is_labelled]
    accuracy = float((decided == labels).double().mean())
    return {"accuracy": accuracy} if name in OF_TOKENS else {"accuracy": accuracy, "f1": macro_f1(decided, labels)}


def _classes_in(decided: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Returns answers and labels of each class that some example has."""
    columns = zip(decided.bool().unbind(1), labels.bool().unbind(1), strict=True)
    return [(own, true) for own, true in columns if bool(own.any() | true.any())]


@torch.no_grad()
def task_scores(model: nn.Module, batches: Iterable[Batch], loss: TaskLoss) -> dict[str, float | None]:
    """Returns the mean loss over some batches, and the scores of the model's answers."""
    total, count = 0.0, 0
    decided: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in batches:
        check_signals()
        outputs = loss.outputs(model, batch)
        total += float(loss.loss(outputs, batch["labels"]))
        count += int(loss.count(batch["labels"]))
        rows = loss.decided(outputs).cpu(), batch["labels"].cpu()
        if loss.name in ("words", *OF_TOKENS):  # rows of different lengths
            is_labelled = rows[1] != IGNORE_INDEX
            rows = rows[0][is_labelled], rows[1][is_labelled]
        decided.append(rows[0])
        labels.append(rows[1])
    return {"loss": total / count, **scores(loss.name, torch.cat(decided), torch.cat(labels))}
