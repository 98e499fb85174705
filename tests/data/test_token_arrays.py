"""Tests of flat arrays of tokens against plain lists, in memory and in files."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.data import token_arrays
from qlora_lite.data.encoding import Marked, TokenizedExample
from qlora_lite.data.token_arrays import COLUMNS, Examples, TokenWriter, column_path, mapped, with_something_to_learn
from qlora_lite.errors import CheckpointError


@st.composite
def marked(draw: st.DrawFn) -> Marked:
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=12))
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    return Marked(ids, [(start, stop) for start, stop in zip(cuts[::2], cuts[1::2], strict=False) if start < stop])


RECORDS = st.lists(st.lists(marked(), min_size=1, max_size=3), min_size=1, max_size=6)


def written(records: list[list[Marked]], folder: Path | None = None) -> token_arrays.TokenArrays:
    writer = TokenWriter(folder)
    for number, examples in enumerate(records):
        writer.append(number, examples)
    return writer.finish()[0]


@given(records=RECORDS, max_length=st.none() | st.integers(2, 14))
@settings(max_examples=150, deadline=None)
def test_examples_are_those_that_were_written(records: list[list[Marked]], max_length: int | None) -> None:
    arrays = written(records)
    plain = [example.example() for examples in records for example in examples]
    cut = [TokenizedExample(e.input_ids[:max_length], e.labels[:max_length]) for e in plain]
    found = Examples(arrays, None, max_length)
    assert list(found) == cut and found == cut
    assert found.lengths.tolist() == [len(example.input_ids) for example in cut]
    assert found.learned_tokens == sum(example.learned_tokens for example in cut)
    assert found.truncated == sum(len(e.input_ids) < len(p.input_ids) for e, p in zip(cut, plain, strict=True))
    assert with_something_to_learn(arrays, max_length).tolist() == [
        number for number, example in enumerate(cut) if example.learned_tokens
    ]
    assert arrays.records.tolist() == [number for number, examples in enumerate(records) for _ in examples]


def test_equal_records_have_equal_digests_and_others_do_not() -> None:
    one, other = Marked([5, 6], [(1, 2)]), Marked([5, 6], [(0, 2)])
    digests = written([[one], [other], [one], [one, one]]).digests.tolist()
    assert digests[0] == digests[2] and digests[3] == digests[4]
    assert len(set(digests)) == 3


@pytest.mark.parametrize("buffer", [1, 1 << 20])
def test_files_hold_the_same_and_are_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer: int) -> None:
    monkeypatch.setattr(token_arrays, "BUFFER_BYTES", buffer)
    records = [[Marked([1, 2, 3], [(1, 3)])], [Marked([4], []), Marked([2**31 - 1, 0], [(0, 1)])]]
    in_memory, on_disk = written(records), written(records, tmp_path)
    for name in COLUMNS:
        assert torch.equal(getattr(in_memory, name), getattr(on_disk, name))
        assert torch.equal(safetensors.torch.load_file(column_path(tmp_path, name))[name], getattr(in_memory, name))
    assert Examples(on_disk)[0] == TokenizedExample([1, 2, 3], [IGNORE_INDEX, 2, 3])


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    written([[Marked([1, 2], [])]], tmp_path)
    with pytest.raises(CheckpointError, match=r"lengths.safetensors has 132 bytes; expected 136"):
        mapped(column_path(tmp_path, "lengths"), "lengths", 2)


def test_examples_are_a_sequence() -> None:
    found = Examples(written([[Marked([n, n + 1], [(1, 2)])] for n in range(5)]))
    assert found[-1] == found[4] and found[1:3] == [found[1], found[2]]
    assert [example.input_ids[0] for example in found[::2]] == [0, 2, 4]
    with pytest.raises(IndexError, match="example 5 of 5"):
        found[5]
