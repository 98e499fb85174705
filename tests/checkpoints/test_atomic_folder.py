"""Two folders trade places."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qlora_lite.checkpoints.atomic_folder import exchanged


@pytest.mark.skipif(sys.platform != "linux", reason="a call of Linux")
def test_two_folders_trade_places_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    (one / "first").touch()
    with pytest.raises(FileNotFoundError):
        exchanged(one, other)
    other.mkdir()
    assert exchanged(one, other)
    assert [path.name for path in other.iterdir()] == ["first"] and not list(one.iterdir())
