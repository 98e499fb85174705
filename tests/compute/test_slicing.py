"""Slices: all of them on real tensors, the ends on fake ones."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_lite.compute.cross_entropy import linear_cross_entropy
from qlora_lite.compute.slicing import covering
from qlora_lite.memory.trace import StorageTrace


@given(st.integers(0, 60), st.integers(1, 9))
def test_real_rows_are_covered_once(rows: int, size: int) -> None:
    found = [row for part in covering(rows, size, torch.empty(0)) for row in range(rows)[part]]
    assert found == list(range(rows))


def test_of_many_fake_slices_those_at_the_ends_are_left() -> None:
    with FakeTensorMode():
        fake = torch.empty(0)
    assert list(covering(23, 3, fake)) == [slice(0, 3), slice(3, 6), slice(18, 21), slice(21, 24)]
    assert list(covering(12, 3, fake)) == list(covering(12, 3, torch.empty(0)))


def test_a_fake_loss_has_the_peak_of_the_real_one() -> None:
    def peak(fake: bool) -> int:
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.autograd.set_grad_enabled(True):
            hidden = torch.zeros(4000, 8, requires_grad=True)
            weight, labels = torch.zeros(5000, 8), torch.zeros(4000, dtype=torch.int64)
            with StorageTrace() as trace:
                linear_cross_entropy(hidden, weight, labels).backward()
        return trace.peak()[0]

    assert peak(fake=True) == peak(fake=False)
