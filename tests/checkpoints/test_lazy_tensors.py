"""Tests of lazy views of tensors in files against torch's stack, cat, slicing and transpose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from qlora_lite.checkpoints import lazy_tensors
from qlora_lite.checkpoints.lazy_tensors import (
    Concatenated,
    Interleaved,
    LazyTensor,
    Narrowed,
    Stacked,
    Transposed,
    read_slices,
)
from qlora_lite.checkpoints.safetensors_read import stored_tensors
from qlora_lite.errors import CheckpointError


def stored(folder: Path, **tensors: Tensor) -> dict[str, LazyTensor]:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "x.safetensors")
    return dict(stored_tensors(folder / "x.safetensors"))


def views(folder: Path, a: Tensor, b: Tensor) -> list[tuple[LazyTensor, Tensor]]:
    """Views, of the stacks a and b of one shape, and what they are views of."""
    files = stored(folder, a=a, b=b)
    one, two = files["a"], files["b"]
    both = (one, two)
    cases: list[tuple[LazyTensor, Tensor]] = [(Stacked("s", both), torch.stack((a, b)))]
    for dim in range(3):
        cases.append((Concatenated("j", both, dim), torch.cat((a, b), dim)))
        length = a.shape[dim] - 1
        cases.append((Narrowed("n", one, dim, 1, length), a.narrow(dim, 1, length)))
        if a.shape[dim] % 2 == 0:
            evens_first = torch.cat(
                [a.index_select(dim, torch.arange(place, a.shape[dim], 2)) for place in (0, 1)], dim
            )
            cases.append((Interleaved(one, dim), evens_first))
            cases.append((Interleaved(Interleaved(one, dim), dim, inverse=True), a))
    cases += [(Transposed(one, *dims), a.transpose(*dims)) for dims in ((0, 1), (0, 2), (1, 2))]
    joined = Concatenated("j", tuple(Stacked("s", (part.select(0), part.select(1))) for part in both), 1)
    cases.append((joined, torch.cat((a[:2], b[:2]), 1)))
    cases.append((Transposed(Narrowed("n", joined, 2, 1, a.shape[2] - 1), 1, 2), joined_tensor(a, b)))
    return cases


def joined_tensor(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat((a[:2], b[:2]), 1)[:, :, 1:].transpose(1, 2)


@given(sizes=st.tuples(*[st.integers(2, 5)] * 3), largest=st.integers(1, 200))
def test_rows_and_parts_are_those_of_the_tensor(
    tmp_path_factory: pytest.TempPathFactory, sizes: tuple[int, int, int], largest: int
) -> None:
    folder = tmp_path_factory.mktemp("views")
    whole_pass, lazy_tensors.PASS_BYTES = lazy_tensors.PASS_BYTES, largest
    try:
        for view, tensor in views(folder, torch.randn(sizes), torch.randn(sizes).bfloat16()):
            assert view.shape == tuple(tensor.shape) and view.dtype == tensor.dtype
            assert torch.equal(torch.cat([rows for _, rows in read_slices(view, largest)]), tensor)
            for index in range(tensor.shape[0]):
                part = view.select(index)
                assert part.shape == tuple(tensor.shape[1:])
                assert torch.equal(part.rows(1, part.shape[0]), tensor[index][1:])
    finally:
        lazy_tensors.PASS_BYTES = whole_pass


def test_pieces_that_do_not_fit_are_named(tmp_path: Path) -> None:
    files = stored(tmp_path, a=torch.zeros(2, 3), b=torch.zeros(2, 4))
    pair = (files["a"], files["b"])
    with pytest.raises(CheckpointError, match=r"both is made of .* fit together: a \(2, 3\), b \(2, 4\)"):
        Stacked("both", pair)
    with pytest.raises(CheckpointError, match="do not fit together"):
        Concatenated("both", pair, 0)
    assert Concatenated("both", pair, 1).shape == (2, 7)
