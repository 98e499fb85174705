"""`qlora-lite env`: versions of the libraries, and the machine."""

from __future__ import annotations

from qlora_lite.cli.options import Json, finish


def env(json: Json = False) -> None:
    """Show the versions of the libraries, the machine, what its system lacks, and its choices of kernels."""
    from qlora_lite.choosing.machine_table import described_choices, described_timing
    from qlora_lite.compute.environment import environment

    choices = described_choices()
    shown: dict[str, object] = {"choices": choices} if json else {**choices}
    finish({**environment(), **shown, "choices_timed": described_timing()}, json)
