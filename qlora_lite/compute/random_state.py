"""States of all random number generators of a run: torch, the accelerator, Python, numpy, and data loaders."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_lite.errors import CheckpointError, ConfigError

MERSENNE = "MT19937"  # numpy's global generator, unless it was replaced
MERSENNE_WORDS = 624


@dataclass(frozen=True)
class RandomState:
    """States at one time. tensors: of torch's generators, by name. plain: of Python's and numpy's, as JSON."""

    tensors: Mapping[str, Tensor]
    plain: Mapping[str, Any]


@dataclass(frozen=True)
class RandomSources:
    """The generators of a run. generators: of torch, besides the default ones."""

    device: torch.device
    generators: Sequence[torch.Generator] = ()

    @property
    def _has_own_generator(self) -> bool:
        """Whether the device draws from a generator of its own; a pretended accelerator (devices.py) is a CPU."""
        return self.device.type != "cpu"

    def capture(self) -> RandomState:
        """Returns the current states."""
        tensors = {"torch": torch.get_rng_state()}
        if self._has_own_generator:
            tensors["accelerator"] = torch.get_device_module(self.device).get_rng_state()
        tensors |= {f"generator.{number}": source.get_state() for number, source in enumerate(self.generators)}
        version, words, gauss = random.getstate()
        plain: dict[str, object] = {"python": [version, list(words), gauss]}
        if (numpy := sys.modules.get("numpy")) is not None:
            state = numpy.random.get_state(legacy=False)
            if (kind := state["bit_generator"]) != MERSENNE:
                raise ConfigError(f"numpy's global generator must be {MERSENNE} for a run to be resumed; got {kind}")
            inner = state["state"]
            plain["numpy"] = [inner["key"].tolist(), int(inner["pos"]), int(state["has_gauss"]), float(state["gauss"])]
        return RandomState(tensors, plain)

    def restore(self, state: RandomState) -> None:
        """Restores all generators. Raises CheckpointError if the state is of other generators, or damaged."""
        wanted = {"torch", *(f"generator.{number}" for number in range(len(self.generators)))}
        wanted |= {"accelerator"} if self._has_own_generator else set()
        if wanted != set(state.tensors):
            raise CheckpointError(
                f"the random numbers of the run came from {', '.join(sorted(state.tensors))}; here they come from "
                f"{', '.join(sorted(wanted))}: give the same kind of batches, and the same device"
            )
        try:
            self._set(state)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            why = str(error).splitlines()[0]
            raise CheckpointError(f"the random states of the run do not fit these generators: {why}") from error

    def _set(self, state: RandomState) -> None:
        torch.set_rng_state(state.tensors["torch"])
        if self._has_own_generator:
            torch.get_device_module(self.device).set_rng_state(state.tensors["accelerator"])
        for number, source in enumerate(self.generators):
            source.set_state(state.tensors[f"generator.{number}"])
        version, words, gauss = state.plain["python"]
        random.setstate((version, tuple(words), gauss))
        if "numpy" in state.plain:
            import numpy

            words, place, has_gauss, gauss = state.plain["numpy"]
            if len(words) != MERSENNE_WORDS or not 0 <= place <= MERSENNE_WORDS:  # numpy itself reads beyond its words
                raise ValueError(f"numpy's has {len(words)} words and is at {place}; {MERSENNE_WORDS} are expected")
            numpy.random.set_state((MERSENNE, numpy.array(words, dtype=numpy.uint32), place, has_gauss, gauss))


def loader_generators(batches: object) -> list[torch.Generator]:
    """Returns the generators that a DataLoader and its samplers were given, each once; [] for other objects."""
    if not isinstance(batches, torch.utils.data.DataLoader):
        return []
    owners = (batches, batches.sampler, batches.batch_sampler, getattr(batches.batch_sampler, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(source): source for source in found if isinstance(source, torch.Generator)}.values())
