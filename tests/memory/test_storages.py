"""Tests of finding the storages of tensors."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_lite.memory.storages import storages_of, tensors_in


def sizes(tensor: torch.Tensor) -> list[int]:
    return [storage.nbytes() for storage in storages_of(tensor)]


def test_tensors_are_found_in_tuples_lists_and_dicts() -> None:
    one, two, three = torch.ones(1), torch.ones(2), torch.ones(3)
    found = list(tensors_in((one, [two, "no tensor"], {"state": {"exp_avg": three}}, None)))
    assert [tensor.numel() for tensor in found] == [1, 2, 3]


def test_a_view_has_the_storage_of_its_base() -> None:
    base = torch.zeros(10, 4)
    assert sizes(base[3]) == sizes(base.t()) == [160]


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state")
def test_a_sparse_tensor_has_the_storages_of_its_parts() -> None:
    values, places = torch.ones(2), torch.tensor([1, 2])
    offsets = torch.tensor([0, 1, 1, 2])
    assert sizes(torch.sparse_coo_tensor(torch.stack((places, places)), values, (3, 3))) == [2 * 2 * 8, 2 * 4]
    for layout in (torch.sparse_csr, torch.sparse_csc):
        sparse = torch.sparse_compressed_tensor(offsets, places, values, (3, 3), layout=layout)
        assert sizes(sparse) == [4 * 8, 2 * 8, 2 * 4]


def test_a_meta_tensor_has_no_storage_and_a_fake_one_has() -> None:
    assert sizes(torch.empty(1000, device="meta")) == []
    with FakeTensorMode():
        assert sizes(torch.empty(1000)) == [4000]
