"""`qlora-lite env`: versions of the libraries, and the machine."""

from __future__ import annotations

from qlora_lite.cli.options import Json, finish


def env(json: Json = False) -> None:
    """Show the versions of the libraries, the machine, and what its system lacks."""
    from qlora_lite.compute.environment import environment

    finish(environment(), json)
