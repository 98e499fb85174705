"""`qlora-lite env`: versions of the libraries, and the machine."""

from __future__ import annotations

from qlora_lite.cli.options import (
    Json,
    finish,
)


def env(json: Json = False) -> None:
    """Show versions, the machine, and whether its CPU multiplies bf16."""
    from qlora_lite.compute.environment import environment

    finish(environment(), json)
