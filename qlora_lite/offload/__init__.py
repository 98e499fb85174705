"""Frozen bytes that come when they are needed: the order of a model's blocks, and bases that stay on disk.

In reading order:

block_order   tells a source of bytes which block comes, which is next, and which is through
mapped_file   tensors that lie in a file and are read when their values are
base_bytes    how much of a base lies on disk, is resident, and is read, from shapes alone
disk_source   a base in mapped files, read a block ahead and let go behind
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.offload.block_order import BlockSource as BlockSource
    from qlora_lite.offload.block_order import follow_blocks_ as follow_blocks_
    from qlora_lite.offload.block_order import followed_blocks as followed_blocks

__getattr__, __dir__, __all__ = lazy_names(__name__, {"block_order": "BlockSource follow_blocks_ followed_blocks"})
