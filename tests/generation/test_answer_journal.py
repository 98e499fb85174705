"""Tests of the journal of answers: whole lines survive, and only those of the same run count."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from qlora_lite.errors import CheckpointError
from qlora_lite.generation.answer_journal import journal_path, open_journal, read_header, run_date

HEADER = {"settings": {"seed": 1, "top_k": None}, "prompts": "abc", "date": "2020-01-02"}


@pytest.fixture
def path(memory_path: Path) -> Path:
    """A journal of three answers."""
    found = journal_path(memory_path / "out.jsonl")
    with open_journal(found, HEADER) as journal:
        journal.add({4: {"answer": "fünf"}, 0: {"answer": "zero"}})
        journal.add({2: {"answer": "two"}})
    return found


def test_answers_are_found_by_number(path: Path) -> None:
    assert path.name == "out.jsonl.partial" and run_date(path.with_suffix("")) == datetime.date(2020, 1, 2)
    with open_journal(path, HEADER) as journal:
        assert set(journal.done) == {0, 2, 4}
        assert journal.answer(4) == {"answer": "fünf"}
        journal.add({1: {"answer": "one"}})  # behind the others, although one was read before
        assert journal.answer(2) == {"answer": "two"} and journal.answer(1) == {"answer": "one"}


def test_a_cut_line_is_dropped_wherever_it_is_cut(path: Path) -> None:
    whole = path.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for cut in sorted({*range(0, len(whole), 23), *ends, *(end - 1 for end in ends)}):
        path.write_bytes(whole[:cut])
        with open_journal(path, HEADER) as journal:
            assert len(journal.done) == max(0, sum(end <= cut for end in ends) - 1)
            journal.add({7: {"answer": "x"}})
        with open_journal(path, HEADER) as journal:
            assert journal.answer(7) == {"answer": "x"}


def test_another_run_is_refused_with_what_differs(path: Path) -> None:
    before = path.read_bytes()
    other = {**HEADER, "settings": {"seed": 2, "top_k": None}, "prompts": "abd"}
    differ = "another run: the prompts differ; seed was 1 and is 2; restore these, or begin anew with overwrite"
    with pytest.raises(CheckpointError, match=differ), open_journal(path, other):
        pass
    assert path.read_bytes() == before
    with open_journal(path, other, anew=True) as journal:
        assert not journal.done
    with open_journal(path, HEADER, anew=True) as journal:
        journal.add({3: {}})
    with open_journal(path, HEADER, anew=True) as journal:
        assert set(journal.done) == {3}  # of the same run: it goes on


@pytest.mark.parametrize("line", [b"[1]", b"\xff", b'{"number": "x"}', b"{"])
def test_damage_is_named(path: Path, line: bytes) -> None:
    path.write_bytes(path.read_bytes() + line + b"\n")
    damaged = r"out.jsonl.partial, line 5 is damaged; remove the file to begin anew"
    with pytest.raises(CheckpointError, match=damaged), open_journal(path, HEADER):
        pass


def test_no_journal_and_one_of_half_a_line_say_nothing(tmp_path: Path) -> None:
    assert read_header(tmp_path / "x") is None
    (tmp_path / "x").write_bytes(b'{"a"')
    assert read_header(tmp_path / "x") is None
    (tmp_path / "out.jsonl.partial").write_bytes(b'{"date": "yesterday"}\n')
    assert run_date(tmp_path / "out.jsonl") is None
