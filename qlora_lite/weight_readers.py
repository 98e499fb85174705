"""Finds layers whose weight a model reads instead of calling them, by the source code of its classes.

`self.dt_proj.weight @ x`, as in Mamba, needs a plain tensor and would skip an adapter. Such a layer stays unpacked and
gets no adapter. Reading only the dtype, device or shape of a weight does not count, nor does code that an attribute of
the module switches off.
"""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

from torch import nn

# Attributes of a weight that a model may read without computing with it.
HARMLESS = frozenset({"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_meta"})
# Methods that prepare a model and do not compute with it.
PREPARING = ("init", "reset", "resize", "tie", "prune")
# Base classes that serve all models, whose methods are not part of what a model computes.
GENERAL = ("torch.", "transformers.modeling_", "transformers.generation")

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], object]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


@dataclass(frozen=True)
class _Read:
    """`<owner>.<path>.weight` in a method.

    from_self: whether the owner is `self`, else it is any other variable. function: the name of the function that the
    weight is an argument of, if any. guards: the conditions around it, each with the value that lets it run.
    """

    method: str
    path: tuple[str, ...]
    from_self: bool
    function: str | None
    guards: tuple[tuple[ast.expr, bool], ...]


# The value of an expression that depends on more than the constants of a module.
_UNKNOWN = object()


def _value(node: ast.expr, module: nn.Module) -> Any:
    """Returns the value of an expression of constants and attributes of `self`, or _UNKNOWN."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Name(id="self"):
            return module
        case ast.Attribute(attr=name) if name != "training":
            return getattr(_value(node.value, module), name, _UNKNOWN)
        case ast.UnaryOp(op=ast.Not()):
            found = _value(node.operand, module)
            return found if found is _UNKNOWN else not found
        case ast.Compare(ops=[operation]) if type(operation) in _COMPARISONS:
            sides = _value(node.left, module), _value(node.comparators[0], module)
            return _UNKNOWN if any(side is _UNKNOWN for side in sides) else _COMPARISONS[type(operation)](*sides)
        case ast.BoolOp():  # one part may decide although others are unknown
            parts, decides = [_value(part, module) for part in node.values], isinstance(node.op, ast.Or)
            if any(part is not _UNKNOWN and bool(part) is decides for part in parts):
                return decides
            return _UNKNOWN if any(part is _UNKNOWN for part in parts) else not decides
    return _UNKNOWN


def _runs(guard: ast.expr, wanted: bool, module: nn.Module) -> bool:
    """Whether code that needs this value of a condition may run."""
    try:
        found = _value(guard, module)
    except TypeError:  # values that cannot be compared
        return True
    return found is _UNKNOWN or bool(found) is wanted


def _guards(node: ast.AST, above: dict[ast.AST, ast.AST]) -> Iterator[tuple[ast.expr, bool]]:
    while (parent := above.get(node)) is not None:
        if isinstance(parent, ast.If) and node is not parent.test:
            yield parent.test, node in parent.body
        elif isinstance(parent, ast.IfExp) and node is not parent.test:
            yield parent.test, node is parent.body
        node = parent


def _reads(method: ast.FunctionDef) -> Iterator[_Read]:
    """Yields the reads of weights in the source of a method."""
    above = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(method):
        if not isinstance(node, ast.Attribute) or node.attr != "weight" or not isinstance(node.ctx, ast.Load):
            continue
        parent = above.get(node)
        if isinstance(parent, ast.Attribute) and parent.attr in HARMLESS:
            continue
        path, owner = list[str](), node.value
        while isinstance(owner, ast.Attribute):
            path.insert(0, owner.attr)
            owner = owner.value
        if isinstance(owner, ast.Name) and path:
            call = above.get(parent) if isinstance(parent, ast.keyword) else parent
            function = call.func.id if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else None
            yield _Read(method.name, tuple(path), owner.id == "self", function, tuple(_guards(node, above)))


@functools.cache
def _definitions(module: str) -> dict[str, ast.ClassDef | ast.FunctionDef]:
    """Returns the classes and functions of a module's source by qualified name; none if there is no source."""
    try:
        source = inspect.getsourcefile(sys.modules[module])
        tree = ast.parse("" if source is None else Path(source).read_text(encoding="utf-8"))
    except (KeyError, TypeError, OSError, SyntaxError, UnicodeDecodeError):
        return {}
    found: dict[str, ast.ClassDef | ast.FunctionDef] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
                found[prefix + child.name] = child
                below = "." if isinstance(child, ast.ClassDef) else ".<locals>."
                visit(child, f"{prefix}{child.name}{below}")
            elif isinstance(child, (ast.If, ast.Try, ast.With)):
                visit(child, prefix)

    visit(tree, "")
    return found


@functools.cache
def _class_reads(kind: type) -> tuple[_Read, ...]:
    """Returns the reads in the methods of a class, its own and inherited ones."""
    found: dict[str, list[_Read]] = {}
    for owner in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        source = (
            None if owner.__module__.startswith(GENERAL) else _definitions(owner.__module__).get(owner.__qualname__)
        )
        for method in [] if source is None else source.body:
            if isinstance(method, ast.FunctionDef) and not any(word in method.name for word in PREPARING):
                found.setdefault(method.name, list(_reads(method)))
    return tuple(read for reads in found.values() for read in reads)


@functools.cache
def _is_unused_kernel(module: str, function: str) -> bool:
    """Whether this is a kernel whose library is not installed, and in whose place transformers calls `return None`."""
    wrapped = getattr(sys.modules.get(module), function, None)
    source = _definitions(module).get(function)
    if not isinstance(wrapped, FunctionType) or not hasattr(wrapped, "__wrapped__") or source is None:
        return False
    is_installed = inspect.getclosurevars(wrapped).nonlocals.get("is_new_implementation")
    return is_installed is False and ast.unparse(source.body[-1]) == "return None"


def weights_read(model: nn.Module) -> dict[str, str]:
    """Returns the names of the layers whose weight another module reads, each with the method that reads it."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, str] = {}
    for path, owner in modules.items():
        prefix = f"{path}." if path else ""
        for read in _class_reads(type(owner)):  # type: ignore[arg-type]  # a class is hashable
            name, method = ".".join(read.path), f"{type(owner).__name__}.{read.method}"
            if read.method in vars(owner):  # replaced in this module
                continue
            if read.function is not None and _is_unused_kernel(type(owner).__module__, read.function):
                continue
            if not all(_runs(guard, wanted, owner) for guard, wanted in read.guards):
                continue
            if read.from_self:
                names = [prefix + name] if prefix + name in modules else []
            else:
                names = [other for other in modules if other.startswith(prefix) and other.endswith(f".{name}")]
            for other in names:
                found.setdefault(other, method)
    return found


def described_reads(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Returns a sentence for each of these layers whose weight is read, so that an adapter would have no effect.

    Embeddings do not count: they are called too, and their weight is read where the output head is tied to them.
    """
    read = weights_read(model)
    return [
        f"{name}: {read[name]} reads its weight instead of calling it, so an adapter would have no effect"
        for name in names
        if name in read and not isinstance(model.get_submodule(name), nn.Embedding)
    ]
