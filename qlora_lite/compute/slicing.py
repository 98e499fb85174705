"""Work that is done some rows at a time, so that what it makes on the way stays small.

On fake tensors (memory/rehearse.py) nothing is computed, only allocated, and slices of one size allocate the same:
there the first two and the last two stand for all. So rehearsing a long batch takes no longer than a short one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# At each end: the second slice meets what the first one left behind, the last one may be shorter.
SHOWN = 2


def covering(rows: int, size: int, like: Tensor) -> Iterator[slice]:
    """Slices of `size` that cover `rows`, the last may be shorter; of many, those at the ends if `like` is fake.

    Only for loops of which each turn lets go of what it made, or writes it into what was there before.
    """
    starts: Sequence[int] = range(0, rows, size)
    if isinstance(like, FakeTensor) and len(starts) > 2 * SHOWN:
        starts = [*starts[:SHOWN], *starts[-SHOWN:]]
    for start in starts:
        yield slice(start, start + size)
