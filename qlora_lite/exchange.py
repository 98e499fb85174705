"""Two names in a folder trade places in one move (renameat2(2), RENAME_EXCHANGE), which Python has no function for."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

AT_FDCWD = -100
RENAME_EXCHANGE = 2
# What says that the system, or the file system, cannot do it: that is no failure of this move.
UNABLE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def exchanged(one: Path, other: Path) -> bool:
    """Has two existing names trade places, so that at no instant either is missing. False where that cannot be done.

    OSError for whatever else goes wrong.
    """
    move = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux, glibc 2.28 or musl 1.2.5
    if move is None:
        return False
    if move(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNABLE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))
