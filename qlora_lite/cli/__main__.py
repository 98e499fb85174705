"""What the program `qlora-lite` runs first: Ctrl-C ends it with one line from here on, also while it imports the rest.

Until the command has handlers of its own (main.py), Python would answer SIGINT with a traceback of its imports.
"""

from __future__ import annotations

import os
import signal


def _exit(number: int, frame: object) -> None:
    os.write(2, b"stopped by SIGINT before anything was done\n")  # sys.stderr may be in the middle of a line
    os._exit(128 + number)


def main() -> None:
    """Runs the command of `sys.argv`."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # else it is ignored, and stays so
        signal.signal(signal.SIGINT, _exit)
    from qlora_lite.cli.main import main as run_command

    run_command()


if __name__ == "__main__":
    main()
