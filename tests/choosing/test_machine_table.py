"""Tests of the remembered table: read, refused, written, overridden; times are given, not taken."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qlora_lite.choices import DEFAULTS, INTEGER_PRODUCTS, NAMES, with_overrides
from qlora_lite.choosing import machine_table as table
from qlora_lite.choosing.measure import Seconds
from qlora_lite.compute.devices import accelerator_pretended
from qlora_lite.errors import ConfigError

CPU = torch.device("cpu")


class Measurements:
    """In place of `measure`: torch's kernels, and the second alternative in general, take half of the time."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.busy = False

    def __call__(self, dtype: str) -> Seconds | None:
        self.made.append(dtype)
        keys = [key for key in NAMES if f".{dtype}." in key or "." not in key]
        return None if self.busy else {key: dict(zip(NAMES[key], (0.2, 0.1), strict=True)) for key in keys}


@pytest.fixture
def measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Measurements]:
    found = Measurements()
    monkeypatch.setattr(table, "measure", found)
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(table.VARIABLE)
    table._times.cache_clear()
    yield found
    table._times.cache_clear()


def fast(dtype: str) -> dict[str, str]:
    return {key: names[1] if f".{dtype}." in key or "." not in key else names[0] for key, names in NAMES.items()}


def test_measured_once_and_read_by_the_next_process(measurements: Measurements) -> None:
    assert table.machine_choices("bf16") == fast("bf16") == table.machine_choices("bf16")
    table._times.cache_clear()  # as in the next process
    assert table.machine_choices("bf16") == fast("bf16") and measurements.made == ["bf16"]
    assert table.machine_choices("fp32") == fast("fp32") and measurements.made == ["bf16", "fp32"]
    table._times.cache_clear()
    assert table.machine_choices("bf16") == fast("bf16") and table.machine_choices("fp32") == fast("fp32")
    assert measurements.made == ["bf16", "fp32"]
    stored = json.loads(table.table_file().read_text())
    assert set(stored["seconds"]) == set(NAMES) and stored["machine"]["threads"] == torch.get_num_threads()
    assert stored["machine"]["torch"] == torch.__version__


def test_another_processor_version_or_number_of_threads_has_a_table_of_its_own(
    measurements: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.machine_choices("bf16")
    first = table.table_file()
    monkeypatch.setattr(table, "processor", lambda: "another")
    assert table.table_file() != first
    table.machine_choices("bf16")
    assert measurements.made == ["bf16", "bf16"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[1]",
        lambda text: text.replace('"threads": ', '"threads": 9'),
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: text.replace("integer_products", "speed"),
        lambda text: text.replace('"int_mm": 0.2', '"int_mm": -1'),
        lambda text: text.replace('"int_mm": 0.2', '"int_mm": NaN'),
        lambda text: text.replace('"int_mm": 0.2', '"int_mm": {}'),
        lambda text: text.replace('"int_mm"', '"other"'),
        lambda text: json.dumps({**json.loads(text), "seconds": 3}),
    ],
)
def test_a_damaged_or_foreign_table_is_measured_again(damage: object, measurements: Measurements) -> None:
    assert callable(damage)
    table.machine_choices("bf16")
    whole = table.table_file().read_text()
    table.table_file().write_text(damage(whole))
    assert table.table_file().read_text() != whole
    table._times.cache_clear()
    assert table.machine_choices("bf16") == fast("bf16") and measurements.made == ["bf16", "bf16"]
    assert table.table_file().read_text() == whole


def test_a_busy_machine_takes_the_defaults_and_remembers_nothing(measurements: Measurements) -> None:
    measurements.busy = True
    assert table.machine_choices("bf16") == DEFAULTS and not table.table_file().exists()
    assert table.machine_choices("bf16") == DEFAULTS and measurements.made == ["bf16"]  # the same until it ends


def test_a_line_says_whether_the_choices_were_timed(
    measurements: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    measurements.busy = True
    assert table.described_choices() == DEFAULTS
    busy = "not for bf16 and fp32: the machine was busy, so these are the defaults; the next start times them again"
    assert table.described_timing() == busy and measurements.made == ["bf16", "fp32"]  # not once more for the line
    measurements.busy = False
    table._times.cache_clear()  # as at the next start
    assert table.described_timing() == "yes, on this machine" and measurements.made == ["bf16", "fp32"] * 2
    monkeypatch.setenv(table.VARIABLE, "default")
    assert table.described_timing() == "no, QLORA_LITE_CHOICES asks for the defaults"


def test_without_a_folder_that_can_be_written_a_process_measures_once(
    measurements: Measurements, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path / "file" / "cache"))
    assert table.machine_choices("bf16") == fast("bf16") == table.machine_choices("bf16")
    assert measurements.made == ["bf16"] and sorted(tmp_path.iterdir()) == [tmp_path / "file"]


def test_two_at_once_leave_one_whole_table(measurements: Measurements) -> None:
    seconds = measurements("bf16")
    assert seconds is not None
    threads = [threading.Thread(target=table._remember, args=(seconds,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert table._remembered() == seconds
    assert [path.name for path in table.table_file().parent.iterdir()] == [table.table_file().name]


def test_the_users_choices_come_first(measurements: Measurements, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(table.VARIABLE, "default")
    assert table.machine_choices("bf16") == DEFAULTS and not measurements.made
    monkeypatch.setenv(table.VARIABLE, "default, attention_forward=torch")
    assert table.machine_choices("bf16") == with_overrides(DEFAULTS, "attention_forward=torch")
    monkeypatch.setenv(table.VARIABLE, "integer_products=quick")
    with pytest.raises(ConfigError, match="integer_products must be one of int_mm, fp32; got 'quick'"):
        table.machine_choices("bf16")
    assert not measurements.made
    monkeypatch.setenv(table.VARIABLE, "integer_products=int_mm")
    assert table.machine_choices("bf16") == {**fast("bf16"), INTEGER_PRODUCTS: "int_mm"}


def test_an_accelerator_and_other_dtypes_take_the_defaults(measurements: Measurements) -> None:
    with accelerator_pretended():
        assert table.device_choices(CPU, torch.bfloat16) == DEFAULTS
    assert table.device_choices(torch.device("meta"), torch.bfloat16) == DEFAULTS
    assert table.device_choices(CPU, torch.float64) == DEFAULTS and not measurements.made
    assert table.device_choices(CPU, torch.bfloat16) == fast("bf16")


def test_choices_are_described_with_their_times(measurements: Measurements, monkeypatch: pytest.MonkeyPatch) -> None:
    described = table.described_choices()
    assert set(described) == set(NAMES)
    assert described[INTEGER_PRODUCTS] == "fp32 (100.00 ms; int_mm 200.00 ms)"
    monkeypatch.setenv(table.VARIABLE, "default")
    assert table.described_choices() == DEFAULTS
