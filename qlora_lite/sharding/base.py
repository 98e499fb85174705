"""`ShardedBase`: the packed base of a model in shares.

Each block is a unit with the codes and statistics of its packed weights. Outside of the blocks, each packed weight and
each matrix (embedding, head) is a unit of its own. Vectors (norms, biases) and the unpacked matrices within blocks are
whole in every process, and so are the adapters.

A packed weight asks for its unit when it is read (`PackedWeight.unit`), in forward, recomputation and backward alike,
so no order of blocks is assumed. An unpacked matrix is asked for when its module is called, and by `weight_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from qlora_lite.errors import ConfigError
from qlora_lite.sharding.group import Group
from qlora_lite.sharding.units import Place, Unit, Window
from qlora_lite.surgery import repeated_blocks

BASE_ATTRIBUTE, UNIT_ATTRIBUTE = "sharded_base", "unit"
SHARED_BUFFERS = ("packed", "absmax", "nested_absmax")


class ShardedBase:
    """The units of a model whose base is in shares; `model.sharded_base`."""

    def __init__(self, model: nn.Module, group: Group) -> None:
        self.group, self._window = group, Window()
        self.units = [Unit(places, group, self._window) for places in places_of_units(model)]
        for unit in self.units:
            for place in unit.places:
                for module, _ in place.holders:
                    setattr(module, UNIT_ATTRIBUTE, unit)
                    module.register_forward_pre_hook(_need_unit)  # a packed weight is never called
        setattr(model, BASE_ATTRIBUTE, self)

    @property
    def own_bytes(self) -> int:
        """The bytes of this process's shares."""
        return sum(unit.own.nbytes for unit in self.units)

    @property
    def nbytes(self) -> int:
        """The bytes of all shares together, without what fills them up."""
        return sum(unit.nbytes for unit in self.units)

    def empty(self) -> None:
        """Lets go of everything that was gathered. Every process must call it."""
        self._window.empty()


def _need_unit(module: nn.Module, arguments: object) -> None:
    module.unit.need()  # type: ignore[union-attr, operator]


def _is_on_meta(tensor: Tensor) -> bool:
    return tensor.is_meta


def places_of_units(model: nn.Module, is_shared: Callable[[Tensor], bool] = _is_on_meta) -> Iterator[list[Place]]:
    """Yields the places of each unit of a model: of packed weights, and of matrices outside of blocks.

    is_shared: whether a tensor of these is to be in shares; while a model is loaded, it is on meta then.
    """
    seen: set[int] = set()

    def new(modules: Iterator[nn.Module]) -> list[nn.Module]:
        codes = ((m, m._buffers.get(SHARED_BUFFERS[0])) for m in modules)
        found = [m for m, buffer in codes if buffer is not None and is_shared(buffer) and id(m) not in seen]
        seen.update(map(id, found))
        return found

    blocks = repeated_blocks(model)
    in_blocks = {id(module) for block in blocks for module in block.modules()}
    for block in blocks:
        if places := [place for weight in new(block.modules()) for place in _packed_places(weight)]:
            yield places
    for weight in new(model.modules()):
        yield _packed_places(weight)
    matrices: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, value in module._parameters.items():
            if id(module) not in in_blocks and value is not None and value.dim() > 1 and is_shared(value):
                matrices.setdefault(id(value), []).append((module, name))
    yield from ([Place.of(holders)] for holders in matrices.values())


def _packed_places(weight: nn.Module) -> list[Place]:
    return [Place.of([(weight, name)]) for name in SHARED_BUFFERS if name in weight._buffers]


def sharded_base(model: nn.Module) -> ShardedBase | None:
    """Returns the base of a model if it is in shares, None if this process holds all of it."""
    return getattr(model, BASE_ATTRIBUTE, None)


def check_whole(model: nn.Module, what: str) -> None:
    """Raises ConfigError if the base of a model is in shares. what: cannot be done then."""
    if sharded_base(model) is not None:
        raise ConfigError(
            f"{what} reads the whole base, of which each process holds a share here; save the adapter, and do it in "
            f"one process with the base loaded whole"
        )


@contextmanager
def ends_told(model: nn.Module) -> Iterator[None]:
    """Leaves the reason for the other processes if the block ends by an exception in a run with shares."""
    base = sharded_base(model)
    if base is None:
        yield
        return
    with base.group.telling():
        yield
        base.empty()


def whole_tensor(model: nn.Module, name: str) -> Tensor:
    """Returns a parameter or buffer by its name, gathered if it is in shares."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    unit: Unit | None = vars(module).get(UNIT_ATTRIBUTE)
    if unit is not None:
        unit.need()
    found: Tensor = getattr(module, key)
    return found


def shares_of(model: nn.Module) -> list[Tensor]:
    """Returns the bytes of this process's shares; none for a base that is whole."""
    base = sharded_base(model)
    return [] if base is None else [unit.own for unit in base.units]
