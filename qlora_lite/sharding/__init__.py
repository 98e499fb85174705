"""A packed base in shares: each of several processes holds a part of its bytes, and gathers a block when it is needed.

In reading order:

group     Group: the processes, their sums and gathers, what they must agree on, and what is said when one is lost
units     Unit: the tensors that are gathered together, as one range of bytes; Window: which of them are here
base      ShardedBase: the units of a model; what other code asks of it
count     what each process will hold, gather and receive, before there are any
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.sharding.base import sharded_base as sharded_base

__getattr__, __dir__, __all__ = lazy_names(__name__, {"base": "sharded_base"})
