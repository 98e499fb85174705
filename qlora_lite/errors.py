"""The errors of qlora_lite; everything that it raises on purpose is a QLoRAError, or Stopped."""

from __future__ import annotations

from collections.abc import Iterable


class QLoRAError(Exception):
    """Base class of the errors of this package."""


class ConfigError(QLoRAError, ValueError):
    """A setting has a value that is not allowed, or two settings contradict each other."""


class TargetError(QLoRAError, ValueError):
    """The model does not have the modules that were asked for, or they cannot be adapted."""


class QuantizationError(QLoRAError, ValueError):
    """A weight cannot be stored in a format or dtype: it has NaN or infinity, or exceeds the range."""


class CheckpointError(QLoRAError, ValueError):
    """A file or folder on disk is missing, damaged, or does not belong to this model."""


class TrainingError(QLoRAError, RuntimeError):
    """Training cannot continue, for example because adapters receive no gradient."""


class NotFiniteError(TrainingError):
    """The loss, the gradients or the adapters became NaN or infinite."""


class RehearsalError(QLoRAError, RuntimeError):
    """A step cannot run on fake tensors: its shapes depend on values, or an operator has no fake kernel."""


class InputError(QLoRAError, ValueError):
    """A tensor passed to a layer has the wrong dtype or shape, or tokens outside of the vocabulary."""


class DeviceMemoryError(QLoRAError, MemoryError):
    """A device has less memory than a sequence of allocations needs."""


class Stopped(SystemExit):
    """SIGINT or SIGTERM was obeyed at a place where no work is half done; the text says how to continue later.

    A SystemExit, so that `except Exception` does not keep the process alive. Uncaught, it exits with the status that
    shells report for these signals, 130 or 143.
    """

    def __init__(self, number: int, sentence: str) -> None:
        super().__init__(128 + number)
        self.number, self.sentence = number, sentence

    def __str__(self) -> str:
        return self.sentence


def listing(items: Iterable[object], most: int = 8, separator: str = ", ") -> str:
    """Returns the first `most` items as text, and the number of the others: `a, b, and 3 more`."""
    texts = [str(item) for item in items]
    left = len(texts) - most
    return separator.join([*texts[:most], f"and {left} more"] if left > 0 else texts)
