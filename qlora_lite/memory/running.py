"""Which module of a model is running, in forward and in backward alike.

Forward is followed by hooks around every module's call. Backward runs nodes of autograd, which know no module, but
torch numbers them in the order in which forward made them: the module that was running when a node got its number is
the one whose backward it is.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


class RunningModule:
    """A context manager that follows the modules of the models named to it by `follow`; others count as none."""

    def __init__(self) -> None:
        self._names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._stack: list[str] = []
        # From this number of a node on: what was running.
        self._starts: list[int] = []
        self._running: list[str | None] = []
        self._hooks: list[Any] = []

    def follow(self, model: nn.Module) -> None:
        """Names the modules of a model, those that came since the last time too."""
        for name, module in model.named_modules():
            self._names[module] = name

    def __enter__(self) -> RunningModule:
        self._hooks = [
            register_module_forward_pre_hook(self._begin),
            register_module_forward_hook(self._end, always_call=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._stack.clear()

    def now(self) -> str | None:
        """The name of the innermost module that is running; in backward, the one whose backward it is."""
        if self._stack:
            return self._stack[-1]
        node = current_node()
        if node is None:
            return None
        place = bisect_right(self._starts, node._sequence_nr())
        return self._running[place - 1] if place else None

    def _note(self) -> None:
        number = next_node_number()
        if self._starts and self._starts[-1] == number:
            self._running.pop()
            self._starts.pop()
        self._starts.append(number)
        self._running.append(self._stack[-1] if self._stack else None)

    def _begin(self, module: nn.Module, args: Any) -> None:
        name = self._names.get(module)
        if name is not None:
            self._stack.append(name)
            self._note()

    def _end(self, module: nn.Module, args: Any, result: Any) -> None:
        name = self._names.get(module)
        if name is not None and name in self._stack:
            # What an exception skipped, a recomputation that was stopped early for one, ended with it.
            while self._stack.pop() != name:
                pass
            self._note()


# torch's own names for these begin with an underscore; there are no others.
current_node: Callable[[], Any] = torch._C._current_autograd_node
next_node_number: Callable[[], int] = torch._C._autograd._get_sequence_nr
