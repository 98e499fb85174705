"""Tracks which module of a model is running, in forward and in backward.

Forward is tracked by hooks around every module's call. Backward runs nodes of autograd, which do not know their module.
But torch numbers nodes in the order in which forward creates them, so a node belongs to the module that was running
when its number was given. (torch.utils.module_tracker.ModuleTracker hooks the inputs and outputs of modules instead.)
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd.graph import Node
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle


class ModuleTracker:
    """A context manager that tracks the modules of the models passed to `track`; other modules count as none."""

    def __init__(self) -> None:
        self._names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._stack: list[str] = []
        # The module _running[i] created the nodes numbered from _first_nodes[i] on.
        self._first_nodes: list[int] = []
        self._running: list[str | None] = []
        self._hooks: list[RemovableHandle] = []

    def track(self, model: nn.Module) -> None:
        """Adds the modules of a model, under their names in it. Call it again after modules were replaced."""
        for name, module in model.named_modules():
            self._names[module] = name

    def __enter__(self) -> ModuleTracker:
        self._hook()
        return self

    def __exit__(self, *_: object) -> None:
        self._unhook()
        self._stack.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block no module is tracked; its nodes count for the module that was running before it."""
        self._unhook()
        try:
            yield
        finally:
            self._hook()

    def _hook(self) -> None:
        self._hooks = [
            register_module_forward_pre_hook(self._begin),
            register_module_forward_hook(self._end, always_call=True),
        ]

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def current(self) -> str | None:
        """Returns the name of the innermost running module; in backward, of the module whose backward is running."""
        if self._stack:
            return self._stack[-1]
        node = current_node()
        if node is None:
            return None
        position = bisect_right(self._first_nodes, node._sequence_nr())
        return self._running[position - 1] if position else None

    def _note(self) -> None:
        number = next_node_number()
        if self._first_nodes and self._first_nodes[-1] == number:
            self._running.pop()
            self._first_nodes.pop()
        self._first_nodes.append(number)
        self._running.append(self._stack[-1] if self._stack else None)

    def _begin(self, module: nn.Module, args: object) -> None:
        name = self._names.get(module)
        if name is not None:
            self._stack.append(name)
            self._note()

    def _end(self, module: nn.Module, args: object, result: object) -> None:
        name = self._names.get(module)
        if name is not None and name in self._stack:
            # Modules inside that an exception left without their hook end here too, for example where recomputation
            # stops early.
            while self._stack.pop() != name:
                pass
            self._note()


# Private in torch, which has no public functions for these.
current_node: Callable[[], Node | None] = torch._C._current_autograd_node
next_node_number: Callable[[], int] = torch._C._autograd._get_sequence_nr
