"""Checkpoints read in shares by several processes.

load_shares     the bytes of this process's share, and no others
"""

from __future__ import annotations
