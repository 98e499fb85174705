"""The readers that fuzz_files.py feeds, without atheris: sound files, its first inputs, and some more."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def fuzz_targets(import_script: Callable[[str], Any]) -> Any:
    return import_script("tests/reliability/fuzz_targets.py")


@pytest.mark.parametrize("name", ["header", "index", "adapter", "records", "run"])
def test_no_file_makes_a_reader_raise_a_foreign_error(name: str, fuzz_targets: Any, memory_path: Path) -> None:
    target, rng = fuzz_targets.TARGETS[name], random.Random(0)
    read, seeds = target.reader(memory_path), target.seeds()
    assert len(seeds) > 40
    for seed in seeds:
        read(seed)
    for _ in range(60):
        read(fuzz_targets.bad_files.damaged_text(rng.choice(seeds), rng))


@pytest.mark.parametrize("name", ["header", "adapter", "run"])
def test_a_foreign_error_reaches_the_fuzzer(
    name: str, fuzz_targets: Any, memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = fuzz_targets.TARGETS[name]
    read, seeds = target.reader(memory_path), target.seeds()

    def broken(*given: Any) -> None:
        raise KeyError("a")

    reader = "training.run_checkpoints.read_json" if name == "run" else "checkpoints.safetensors_read._state"
    monkeypatch.setattr(f"qlora_lite.{reader}", broken)
    with pytest.raises(KeyError):
        read(seeds[1 if name == "run" else 0])


def test_without_atheris_it_says_how_to_get_it(
    import_script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = import_script("tests/reliability/fuzz_files.py")
    monkeypatch.setitem(sys.modules, "atheris", None)
    with pytest.raises(SystemExit, match="atheris is not installed: python -m pip install atheris"):
        script.main()
