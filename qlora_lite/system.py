"""What Linux has and other systems lack: functions of the C library, files of /proc, flags of open(2). And
what is asked of every system: its processor, the folder for caches.

The package works without each of them; docs/limits.md says what is lost. The system is asked for the thing itself, not
for its name, since a Linux can lack it too: another C library, an older kernel, a container.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from pathlib import Path

# Writing to it resets the resident peak of this process (proc(5)).
CLEAR_REFS_FILE = "/proc/self/clear_refs"
# Opens a file for reads and writes that bypass the page cache (open(2)); 0 where there is no such flag.
O_DIRECT: int = getattr(os, "O_DIRECT", 0)


def c_function(name: str) -> Callable[..., int] | None:
    """Returns a function of the C library; None if it has none of this name, or if the system has no such library."""
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no library without a name
        return None
    return function


def user_cache() -> Path:
    """Returns the folder for what can be made again: `$QLORA_LITE_CACHE`, or `~/.cache/qlora_lite`."""
    return Path(os.environ.get("QLORA_LITE_CACHE") or "~/.cache/qlora_lite").expanduser()


def processor() -> str:
    """Returns the name of the processor, with its family and model where Linux tells them: names alone are shared."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    numbers = [f"{name} {told[name]}" for name in ("cpu family", "model") if name in told]
    name = told.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({', '.join(numbers)})" if numbers else name


def opens_folders() -> bool:
    """Whether a folder can be opened, which flushing its names to the disk needs. Windows opens files only."""
    return hasattr(os, "O_DIRECTORY")


def missing() -> list[str]:
    """Returns what this system lacks of the things that the package has a use for, each in a few words."""
    present = {
        "peaks of resident memory (clear_refs)": os.access(CLEAR_REFS_FILE, os.W_OK),
        "limits of malloc (mallopt)": c_function("mallopt") is not None,
        "writes past the page cache (O_DIRECT)": O_DIRECT != 0,
        "exchange of two names (renameat2)": c_function("renameat2") is not None,
        "flushing of folders (O_DIRECTORY)": opens_folders(),
    }
    return [name for name, is_there in present.items() if not is_there]
