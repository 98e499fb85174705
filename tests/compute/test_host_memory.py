"""Tests of the limits on freed heap pages and on oneDNN's cached programs."""

from __future__ import annotations

import itertools
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized
from qlora_lite.compute import host_memory
from qlora_lite.compute.devices import cpu_multiplies_bf16
from qlora_lite.compute.host_memory import (
    PROGRAM_CACHES,
    TRIM_OFTEN,
    TRIM_RARELY,
    HeapTrimmer,
    heap_trimming,
    set_host_limits,
)
from qlora_lite.surgery import repeated_blocks
from qlora_lite.training.forward.activation_checkpointing import checkpointed

GLIBC = platform.libc_ver()[0] == "glibc"


def test_can_be_set_with_glibc_and_says_whether_it_could() -> None:
    assert set_host_limits() is GLIBC


@pytest.mark.skipif(not GLIBC, reason="another malloc")
def test_freed_pages_are_kept_until_they_are_released() -> None:
    program = """
from qlora_lite.compute.host_memory import set_host_limits, release_freed_pages
from qlora_lite.memory.counters import resident_bytes
import torch
set_host_limits()
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
@pytest.mark.parametrize("part", [TRIM_OFTEN, TRIM_RARELY])
def test_a_limit_hands_back_when_the_process_has_grown_and_not_before(part: float) -> None:
    program = f"""
from qlora_lite.compute.host_memory import MIN_GROWTH, HeapTrimmer, set_host_limits
from qlora_lite.memory.counters import resident_bytes
import torch
set_host_limits()
limit = HeapTrimmer({part})
start = resident_bytes()
room = max(MIN_GROWTH, int(start * {part}))
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


@pytest.mark.parametrize(("part", "released"), [(TRIM_OFTEN, 1), (TRIM_RARELY, 0)])
def test_only_a_tight_limit_hands_back_between_phases(
    part: float, released: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(host_memory, "release_freed_pages", lambda: bool(calls.append(1)))
    HeapTrimmer(part).end_phase()
    assert len(calls) == released


SHAPES = """
import torch
from qlora_lite.compute.host_memory import set_host_limits
from qlora_lite.memory.counters import resident_bytes
set_host_limits()
weight = torch.randn(64, 64, dtype=torch.bfloat16)
weight[:8] @ weight
start = resident_bytes()
for rows in range(9, 400):
    torch.ones(rows, 64, dtype=torch.bfloat16) @ weight
print((resident_bytes() - start) >> 20)
"""


@pytest.mark.skipif(not cpu_multiplies_bf16(), reason="oneDNN multiplies nothing of 16 bits here")
def test_products_of_many_shapes_leave_few_programs_behind_and_the_users_own_limit_stays() -> None:
    def grown(**named: str) -> int:
        given = {name: value for name, value in os.environ.items() if name not in itertools.chain(*PROGRAM_CACHES)}
        command = [sys.executable, "-c", SHAPES]
        return int(subprocess.run(command, env=given | named, capture_output=True, text=True, check=True).stdout)

    few, usual = grown(), grown(**{names[0]: "1024" for names in PROGRAM_CACHES})
    assert usual > 100 and few < 0.6 * usual  # of 391 programs 96 are kept
    assert grown(DNNL_PRIMITIVE_CACHE_CAPACITY="16") < 0.8 * few  # the user's own limit, by its older name


CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["none", "full"])
def test_each_block_is_checked_twice(kind: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_quantized(tiny_folder, QuantConfig()).train()
    add_lora_(model, LoraConfig(rank=2))
    blocks, tokens = repeated_blocks(model), torch.randint(100, (1, 8))
    checks: list[int] = []
    monkeypatch.setattr(HeapTrimmer, "check", lambda limit: bool(checks.append(1)))
    with checkpointed(model, kind), heap_trimming(model, CPU, kind):
        loss = model(tokens, labels=tokens, use_cache=False).loss
        assert len(checks) == len(blocks)
        loss.backward()
    # Nothing before the first block is trained, but its own adapters are.
    assert len(checks) == 2 * len(blocks)
    assert not any("forward" in vars(block) for block in blocks)


def test_an_accelerators_memory_is_left_alone(tiny_folder: Path) -> None:
    model = load_quantized(tiny_folder, QuantConfig())
    with heap_trimming(model, torch.device("meta"), "full"):
        assert not any("forward" in vars(block) for block in repeated_blocks(model))
