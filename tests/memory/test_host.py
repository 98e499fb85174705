"""The limits of malloc."""

from __future__ import annotations

import platform

from qlora_lite.memory.host import keep_freed_pages


def test_can_be_set_with_glibc_and_says_whether_it_could() -> None:
    assert keep_freed_pages() is (platform.libc_ver()[0] == "glibc")
