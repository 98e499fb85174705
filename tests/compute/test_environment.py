"""Tests of the report on libraries and machine."""

from __future__ import annotations

import os
import platform

import pytest
import torch

from qlora_lite import system
from qlora_lite.compute.environment import environment


def test_versions_and_machine_are_the_ones_there() -> None:
    figures = environment()
    assert figures["python"] == platform.python_version() and figures["torch"] == torch.__version__
    assert figures["cores"] == os.cpu_count()
    assert figures["memory_bytes"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_simulated_what_the_system_lacks_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment()["missing"] == system.missing()
    monkeypatch.setattr(system, "O_DIRECT", 0)
    assert "writes past the page cache (O_DIRECT)" in environment()["missing"]  # type: ignore[operator]


def test_what_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_lite.compute.environment.PACKAGES", ("no-such-package-here",))
    assert environment()["no-such-package-here"] is None
