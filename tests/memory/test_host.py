"""The limits of malloc."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from qlora_lite.memory import host
from qlora_lite.memory.host import LOOSE, TIGHT, HoleLimit, keep_freed_pages

GLIBC = platform.libc_ver()[0] == "glibc"


def test_can_be_set_with_glibc_and_says_whether_it_could() -> None:
    assert keep_freed_pages() is GLIBC


@pytest.mark.skipif(not GLIBC, reason="another malloc")
def test_freed_pages_are_kept_until_they_are_released() -> None:
    program = """
from qlora_lite.memory.host import keep_freed_pages, release_freed_pages
from qlora_lite.memory.measure import resident_bytes
import torch
keep_freed_pages()
start = resident_bytes()
kept = [torch.ones(1 << 20) for _ in range(40)]
above = torch.ones(1 << 20)
del kept
held = resident_bytes() - start
release_freed_pages()
print(held >> 20, (resident_bytes() - start) >> 20)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    held, released = map(int, done.stdout.split())
    assert held > 120 and released < 20


@pytest.mark.skipif(not GLIBC, reason="another malloc")
@pytest.mark.parametrize("part", [TIGHT, LOOSE])
def test_a_limit_hands_back_when_the_process_has_grown_and_not_before(part: float) -> None:
    program = f"""
from qlora_lite.memory.host import LEAST_GROWTH, HoleLimit, keep_freed_pages
from qlora_lite.memory.measure import resident_bytes
import torch
keep_freed_pages()
limit = HoleLimit({part})
start = resident_bytes()
room = max(LEAST_GROWTH, int(start * {part}))
values = (room // 2) // 4 // 8
held = [torch.ones(values) for _ in range(8)]
print(limit.check())  # half of what it may grow
more = [torch.ones(values) for _ in range(16)]
above = torch.ones(1 << 20)
del more
print(limit.check(), (resident_bytes() - start) < room)
print(limit.check())  # what lives is no hole
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True", "False"]


@pytest.mark.parametrize(("part", "released"), [(TIGHT, 1), (LOOSE, 0)])
def test_only_a_tight_limit_hands_back_between_phases(
    part: float, released: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(host, "release_freed_pages", lambda: bool(calls.append(1)))
    HoleLimit(part).phase_ends()
    assert len(calls) == released
