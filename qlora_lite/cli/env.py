"""The command line: parses and wires, computes nothing. Heavy imports stand inside the commands, for quick help.

Exit status: 0 done, 1 failed, 2 wrong usage (one line on stderr says what was wrong), 3 does not fit (plan),
130 interrupted, 143 terminated.
"""

from __future__ import annotations

from qlora_lite.cli.main import app
from qlora_lite.cli.options import (
    Json,
    StrictCommand,
    finish,
)


@app.command(cls=StrictCommand)
def env(json: Json = False) -> None:
    """Show versions, the machine, and whether its CPU multiplies bf16."""
    from qlora_lite.compute.environment import environment

    finish(environment(), json)
