"""Tests of capturing and restoring random states."""

from __future__ import annotations

import json
import random

import numpy
import pytest
import torch
from torch.utils.data import DataLoader

from qlora_lite.compute.random_state import RandomSources, RandomState, loader_generators
from qlora_lite.errors import CheckpointError, ConfigError


def test_every_source_goes_on_as_it_did_through_json() -> None:
    own = torch.Generator().manual_seed(1)
    loader = DataLoader([1, 2], shuffle=True, generator=own)  # type: ignore[arg-type]
    assert loader_generators(loader) == [own] and loader_generators([1]) == []
    sources = RandomSources(torch.device("cpu"), loader_generators(loader))

    def draw() -> list[float]:
        ours = [float(torch.rand(())), float(torch.rand((), generator=own)), float(torch.randn(()))]
        return [*ours, random.random(), random.gauss(0, 1), float(numpy.random.rand()), float(numpy.random.randn())]

    draw()  # leaves a second Gaussian with Python and numpy
    state = sources.capture()
    after = draw()
    for _ in range(2):
        sources.restore(RandomState(state.tensors, json.loads(json.dumps(state.plain))))
        assert draw() == after


def test_other_sources_are_refused() -> None:
    cpu = torch.device("cpu")
    state = RandomSources(cpu, [torch.Generator()]).capture()
    with pytest.raises(CheckpointError, match=r"came from generator\.0, torch; here they come from torch"):
        RandomSources(cpu).restore(state)
    before = numpy.random.get_bit_generator()
    numpy.random.set_bit_generator(numpy.random.PCG64(0))
    try:
        with pytest.raises(ConfigError, match="must be MT19937 for a run to be resumed; got PCG64"):
            RandomSources(cpu).capture()
    finally:
        numpy.random.set_bit_generator(before)
