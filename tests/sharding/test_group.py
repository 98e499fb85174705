"""Tests of the processes that share a base: what they must agree on, and what is said when one is lost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_lite.errors import ConfigError
from qlora_lite.sharding.group import LAUNCHED, check_launched

PROGRAM = """
import json, os, signal, sys
import torch
from qlora_lite.errors import ConfigError, TrainingError
from qlora_lite.sharding.group import Group

group, how = Group.join(), sys.argv[1]
found = {"index": group.index, "sum": float(group.sum(torch.tensor(group.index + 1.0)))}
whole = torch.empty(3 * group.count, dtype=torch.uint8)
group.gather(torch.full((3,), group.index, dtype=torch.uint8), whole)()
found |= {"whole": whole.tolist(), "received": group.received}
found["texts"] = group.all_texts("odd" if group.index % 2 else "")
group.agree({"colour": "blue"})
try:
    group.agree({"shape": "round", "colour": str(group.index // 2)})
except ConfigError as error:
    found["refused"] = str(error)
found["signal"] = group.any_signal(15 * (group.index == 1))
try:
    with group.telling():
        if group.index == 1 and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if group.index == 1 and how == "error":
            raise MemoryError("can't allocate memory")
        group.wait()
except (TrainingError, MemoryError) as error:
    found["ended"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


def test_a_launcher_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="needs several processes: start them by torchrun --nproc-per-node N"):
        check_launched()
    for name in LAUNCHED:
        monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match="got one"):
        check_launched()


@pytest.mark.parametrize("how", ["kill", "error"])
def test_the_others_say_which_process_ended_and_why(
    how: str, start_processes: Callable[..., list[Any]], tmp_path: Path
) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    processes = start_processes(3, script, how)
    processes[1].wait(60)
    ended = time.monotonic()
    printed = [process.communicate(timeout=20)[0] for process in processes]
    assert time.monotonic() - ended < 20
    assert (processes[1].returncode != 0) == (how == "kill")
    why = "ended without a word: it was killed" if how == "kill" else "ended: memory ran out"
    for rank in (0, 2):
        found = json.loads(printed[rank])
        assert found["sum"] == 6 and found["whole"] == [0, 0, 0, 1, 1, 1, 2, 2, 2] and found["received"] == 6
        assert found["texts"] == ["odd"] and found["signal"] == 15
        assert found["refused"].startswith("process 2 of 3 has another colour than process 0")
        assert found["ended"].startswith(f"LostProcess: process 1 of 3 {why}")
        assert found["ended"].endswith(f"process {rank} of 3 ends with it")


SLOW_READER = """
import json, time
from qlora_lite.sharding.group import Group

class Slow:
    def __init__(self, store):
        self.store = store

    def __getattr__(self, name):
        time.sleep(1)
        return getattr(self.store, name)

group = Group.join()
if group.index == 1:
    group._store = Slow(group._store)
print(json.dumps(group.all_texts("odd" if group.index == 1 else "")))
"""


def test_a_process_that_ends_by_a_text_waits_for_those_that_read_it(
    run_processes: Callable[..., list[Any]], tmp_path: Path
) -> None:
    assert run_processes(2, SLOW_READER, tmp_path) == [["odd"], ["odd"]]
