"""Stands in for `python SCRIPT WORDS...` in tests: the script runs in a fork of command_server.py.

    python -IS tests/forked_python.py SOCKET SCRIPT WORDS...

Standard input, output and error of this process are handed on, and the exit status comes back. Anything but a script
(`-c`, `-m`) is run by Python itself.
"""

from __future__ import annotations

import json
import os
import socket
import sys


def main() -> int:
    address, *words = sys.argv[1:]
    if not words or not words[0].endswith(".py"):
        os.execv(sys.executable, [sys.executable, *words])
    request = {"script": words[0], "words": words[1:], "env": dict(os.environ), "cwd": os.getcwd()}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.connect(address)
        socket.send_fds(server, [b"."], [0, 1, 2])
        server.sendall(json.dumps(request).encode() + b"\n")
        status = server.recv(8)
    return int(status) if status else 1  # it was killed


if __name__ == "__main__":
    sys.exit(main())
