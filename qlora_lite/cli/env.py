"""`qlora-lite env`: versions of the libraries, and the machine."""

from __future__ import annotations

from qlora_lite.cli.options import Json, finish


def env(json: Json = False) -> None:
    """Show the versions of the libraries, the machine, what its system lacks, and its choices of kernels."""
    from qlora_lite.choosing.machine_table import described_choices
    from qlora_lite.compute.environment import environment

    choices = described_choices()
    finish({**environment(), **({"choices": choices} if json else choices)}, json)
