"""Damaged files: cases of bad_inputs.py, drawn anew by hypothesis in each run."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lite import QuantConfig, load_quantized
from qlora_lite.checkpoints.files import LARGEST_JSON, read_json
from qlora_lite.checkpoints.safetensors_read import read_safetensors
from qlora_lite.data.records import read_records
from qlora_lite.data.sources.raw import LONGEST_LINE
from qlora_lite.errors import CheckpointError


@pytest.fixture(scope="module")
def bad_inputs(import_script: Callable[[str], Any]) -> Any:
    return import_script("tests/reliability/bad_inputs.py")


@pytest.mark.parametrize("number", range(4))
def test_damaged_and_inconsistent_files_are_refused_or_read_right(number: int, bad_inputs: Any) -> None:
    @settings(max_examples=150)
    @given(st.integers(0, 2**32))
    def check(seed: int) -> None:
        assert bad_inputs.run_case(bad_inputs.FAMILIES[number], seed) is None

    check()


def test_damaged_and_inconsistent_checkpoints_are_refused(bad_inputs: Any) -> None:
    assert bad_inputs.run_cases(bad_inputs.FAMILIES[4:], range(60)) == []


def _opens_pickles(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    if data.startswith(b"cos"):
        (folder.parent / "canary").mkdir()  # the effect of opening it


def test_bad_readers_are_caught(bad_inputs: Any) -> None:
    """Readers that break a rule are caught, each for its fault."""

    def damage(folder: Path, rng: random.Random) -> str:
        (folder / "model.safetensors").write_bytes(bad_inputs.bad_files.canary(folder))
        return "a pickle"

    def slow(folder: Path) -> None:
        while True:
            pass

    def large(folder: Path) -> None:
        bytearray(b"\1") * (400 << 20)

    def other_error(folder: Path) -> None:
        raise KeyError("a")

    readers = {_opens_pickles: "wrote", slow: "took more than", large: "bytes for a file of", other_error: "KeyError"}
    for reader, sentence in readers.items():
        problem = bad_inputs.run_case(bad_inputs.Family("made up", damage, reader), 0)
        assert problem is not None and sentence in problem and problem.startswith("made up 0 (a pickle)")


def test_too_much_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b" " * (LARGEST_JSON + 1))
    with pytest.raises(CheckpointError, match="expected a JSON file, of at most"):
        read_json(tmp_path / "a.json")
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.write(b'{"text": "a"}\n')
        file.truncate(20 * LONGEST_LINE)  # a line of zeros, which takes no disk space
    with pytest.raises(CheckpointError, match=r"so it is damaged or of another kind"):
        read_records(tmp_path / "a.jsonl")
    with open(tmp_path / "b.jsonl", "wb") as file:
        file.write(b'{"text": "a"}\n{"text": "' + b"a" * 5_000)  # what tells the kind of a file
        file.truncate(20 * LONGEST_LINE)
    with pytest.raises(CheckpointError, match=r"line 2: longer than 33,554,432 bytes; split the record"):
        read_records(tmp_path / "b.jsonl")
    with open(tmp_path / "a.safetensors", "wb") as file:
        file.write((90 << 20).to_bytes(8, "little"))
        file.truncate(91 << 20)
    with pytest.raises(CheckpointError, match=r"not a readable safetensors file: its header claims 94,371,840 bytes"):
        read_safetensors(tmp_path / "a.safetensors")


def test_a_name_twice_in_a_header_is_refused(tmp_path: Path) -> None:
    entry = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    header = b"{" + entry + b"," + entry + b"}"
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\1")
    with pytest.raises(CheckpointError, match=r"has 'a' twice in its header"):
        read_safetensors(tmp_path / "a.safetensors")


def test_a_config_of_a_billion_layers_is_refused_at_once(tiny_folder: Path, tmp_path: Path) -> None:
    text = (
        (tiny_folder / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 2147483648')
    )
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="num_hidden_layers 2147483648; at most 4096"):
        load_quantized(tmp_path, QuantConfig())
