"""Tests of the rows of weights in memory, packed and on disk against the tensors of a model."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from qlora_lite import QuantConfig
from qlora_lite.checkpoints import pack_on_load
from qlora_lite.checkpoints.lazy_tensors import Transposed
from qlora_lite.checkpoints.pack_on_load import PackedOnLoad
from qlora_lite.checkpoints.safetensors_read import StoredTensor, stored_tensors
from qlora_lite.compute.slicing import slices_within
from qlora_lite.compute.weight_update import Delta, StackDelta
from qlora_lite.errors import CheckpointError, QuantizationError
from qlora_lite.export.weight_rows import (
    DenseRows,
    MergeInputs,
    RepackedRows,
    StoredRows,
    aligned_slices,
    packed_rows,
    packing_ahead,
)
from qlora_lite.quantization.packed_weight import PackedWeight


def stored(folder: Path, tensor: torch.Tensor) -> StoredTensor:
    save_file({"w": tensor}, folder / "w.safetensors")
    return stored_tensors(folder / "w.safetensors")["w"]


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_weight_that_was_turned_round_to_be_packed_gives_its_rows_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    weight, config = torch.randn(40, 70), QuantConfig(format=format)
    monkeypatch.setattr(pack_on_load, "READ_BYTES", 1)
    source = PackedOnLoad(Transposed(stored(tmp_path, weight)), config, format, torch.float32)
    whole = PackedWeight.of(weight.T.contiguous(), config)
    values = whole.dequantize(torch.float32).T
    for rows in (RepackedRows(source, transposed=True), packed_rows(whole, transposed=True)):
        assert rows.shape == (40, 70)
        parts = slices_within(rows.shape, torch.float32.itemsize, 4 * 70 * 9, rows.step)
        pieces = [rows.rows(part.start, part.stop) for part in parts]
        assert len(pieces) == 5 and torch.equal(torch.cat(pieces), values)


def test_a_file_is_rounded_as_loading_rounds_it(tmp_path: Path) -> None:
    weight = torch.randn(5, 3)
    kept = stored(tmp_path, weight)
    assert torch.equal(StoredRows(kept).rows(1, 4), weight[1:4])
    assert torch.equal(StoredRows(kept, torch.bfloat16).rows(1, 4), weight[1:4].bfloat16().float())
    assert torch.equal(DenseRows(weight.bfloat16()).rows(1, 4), weight[1:4].bfloat16().float())
    assert DenseRows(torch.tensor(2.0)).rows(0, 1) == 2.0


@given(rows=st.integers(1, 40), largest=st.integers(1, 2000), seed=st.integers(0, 99))
def test_merged_slices_are_the_sum_of_the_base_that_is_asked_for(rows: int, largest: int, seed: int) -> None:
    torch.manual_seed(seed)
    trained, original, delta = (
        torch.randn(rows, 6),
        torch.randn(rows, 6),
        Delta(torch.randn(rows, 2), torch.randn(2, 6), 3),
    )
    sources = MergeInputs("w", [DenseRows(trained)], [DenseRows(original)], lambda: delta)
    update = 3 * delta.left @ delta.right
    assert torch.equal(torch.cat(list(sources.base(largest))), trained)
    for base, from_original in ((trained, False), (original, True)):
        merged = torch.cat(list(sources.merged(from_original, torch.float16, largest)))
        torch.testing.assert_close(merged, (base + update).half(), rtol=2e-3, atol=1e-4)
    with pytest.raises(CheckpointError, match="the checkpoint has no w in full precision"):
        MergeInputs("w", [DenseRows(trained)], None, lambda: delta).merged(True, torch.float16, largest)


class Counted:
    """A source that says in which thread it was packed, and may be damaged."""

    shape, step = (64, 64), 1

    def __init__(self, seed: int, damaged: bool = False) -> None:
        self._weight = torch.randn(self.shape, generator=torch.Generator().manual_seed(seed))
        self._damaged, self.threads, self.torch_threads = damaged, list[int](), list[int]()

    def load(self, device: torch.device) -> PackedWeight:
        self.threads.append(threading.get_ident())
        self.torch_threads.append(torch.get_num_threads())
        if self._damaged:
            raise QuantizationError("w holds nan")
        return PackedWeight.of(self._weight.to(device), QuantConfig())


def test_packed_ahead_rows_are_the_same_and_packed_once() -> None:
    sources = [Counted(seed) for seed in range(4)]
    wanted = [RepackedRows(source).rows(0, 64) for source in sources]
    before = threading.active_count(), torch.get_num_threads()
    weights = [RepackedRows(source) for source in sources]
    with packing_ahead(weights):
        got = [torch.cat((weight.rows(0, 32), weight.rows(32, 64))) for weight in weights]
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
    assert (threading.active_count(), torch.get_num_threads()) == before
    here = threading.get_ident()
    assert [source.threads[1:] == [here] for source in sources] == [True, False, False, False]
    assert all(len(source.threads) == 2 for source in sources)
    assert {count for source in sources for count in source.torch_threads[1:]} == {max(1, before[1] // 2)}
    weights[0].rows(0, 64)  # nothing is begun any more
    assert len(sources[1].threads) == 2


def test_what_packing_ahead_fails_at_is_raised_at_its_turn() -> None:
    sources = [Counted(0), Counted(1), Counted(2, damaged=True), Counted(3)]
    weights, seen = [RepackedRows(source) for source in sources], 0
    before = threading.active_count(), torch.get_num_threads()
    with pytest.raises(QuantizationError, match="w holds nan"), packing_ahead(weights):
        for weight in weights:
            weight.rows(0, 64)
            seen += 1
    assert seen == 2 and not sources[3].threads
    assert (threading.active_count(), torch.get_num_threads()) == before


def test_interrupted_it_leaves_no_thread() -> None:
    weights = [RepackedRows(Counted(seed)) for seed in range(3)]
    before = threading.active_count(), torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt), packing_ahead(weights):
        weights[0].rows(0, 64)
        raise KeyboardInterrupt
    assert (threading.active_count(), torch.get_num_threads()) == before


@given(steps=st.tuples(st.integers(1, 5), st.integers(1, 5)), largest=st.integers(1, 2000), adapted=st.booleans())
def test_forms_side_by_side_are_cut_where_each_may_be(steps: tuple[int, int], largest: int, adapted: bool) -> None:
    stack = []
    for _ in range(2):
        forms = [DenseRows(torch.randn(600, 3)) for _ in steps]
        for form, step in zip(forms, steps, strict=True):
            form.step = step
        stack.append(tuple(forms))
    deltas = tuple(Delta(torch.randn(600, 2), torch.randn(2, 3), 1.0) for _ in stack)
    cut = list(aligned_slices(stack, StackDelta(deltas) if adapted else None, largest))
    for number in range(2):
        whole = torch.cat([forms[number].rows(0, 600) for forms in stack])
        assert torch.equal(torch.cat([rows[number] for _, rows, _ in cut]), whole)
    assert all(start % step == 0 for start, _, _ in cut for step in (*steps, Delta.TILE_ROWS if adapted else 1))
