"""What can go wrong, by whose hand: every error that qlora_lite raises on purpose is one of these."""

from __future__ import annotations

from collections.abc import Iterable


class QLoRAError(Exception):
    """The common ancestor: `except QLoRAError` catches what this package refuses, and nothing else."""


class ConfigError(QLoRAError, ValueError):
    """A setting is outside what it may be, or two settings contradict each other."""


class TargetError(QLoRAError, ValueError):
    """The model does not have the modules that were asked for, or they cannot be adapted."""


class QuantizationError(QLoRAError, ValueError):
    """A weight cannot be held in the wanted format: it has NaN or infinity in it, or exceeds its range."""


class CheckpointError(QLoRAError, ValueError):
    """A file or folder on disk is missing, damaged, or does not belong to this model."""


class TrainingError(QLoRAError, RuntimeError):
    """Training cannot go on: the loss is not a number, or adapters receive no gradient."""


class NotFiniteError(TrainingError):
    """The loss, the gradients or the adapters became NaN or infinite."""


class RehearsalError(QLoRAError, RuntimeError):
    """A step cannot be run on fake tensors: its shapes depend on values, or an operator has no fake kernel."""


class InputError(QLoRAError, ValueError):
    """A tensor handed to a layer has the wrong dtype or shape, or holds tokens that the vocabulary does not have."""


class DeviceMemoryError(QLoRAError, MemoryError):
    """A device does not have the memory that a sequence of allocations needs."""


class Stopped(SystemExit):
    """SIGINT or SIGTERM was obeyed, at a place where nothing is half-done; the text says where to go on from.

    A SystemExit, so that `except Exception` does not keep a process alive that was asked to end; uncaught it ends with
    the status that shells give such an end, 130 or 143.
    """

    def __init__(self, number: int, sentence: str) -> None:
        super().__init__(128 + number)
        self.number, self.sentence = number, sentence

    def __str__(self) -> str:
        return self.sentence


def listing(items: Iterable[object], most: int = 8, separator: str = ", ") -> str:
    """Returns the first `most` items as text, and how many are left: `a, b, and 3 more`."""
    texts = [str(item) for item in items]
    left = len(texts) - most
    return separator.join([*texts[:most], f"and {left} more"] if left > 0 else texts)
