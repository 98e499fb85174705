"""The fastest of several computations of the same result on this machine, measured once and remembered.

In reading order:

timed_work       what is timed: inputs of each class of shapes, and a function for each alternative
measure          times the alternatives in turn, and chooses
machine_table    the choices of this machine, from the cache folder or measured now, and the user's own
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.choosing.machine_table import machine_choices as machine_choices

__getattr__, __dir__, __all__ = lazy_names(__name__, {"machine_table": "machine_choices"})
