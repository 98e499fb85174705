"""`Forecasts`: predicted peaks for many batches and settings of one model, from rehearsals of a few of its layers.

A model of L layers is rehearsed with three and with four of them, one step each, and continued to L by straight lines
place by place (memory/growth.py); what the second step has more is the optimizer's states. With five layers it is
rehearsed too, once: where that is not what the lines say, and where a model has no more layers than that, all of it is
rehearsed for every answer. Fake models are made once for each setting, and trained with every batch that is asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from qlora_lite.errors import ConfigError, TargetError
from qlora_lite.lora.config import LoraConfig
from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.trace import storages_of
from qlora_lite.planning.cuda_allocator import replay
from qlora_lite.planning.layer_growth import Place, Sizes, continued, highest_levels, layer_named, peaks
from qlora_lite.planning.rehearsal import fake_profiler
from qlora_lite.planning.training_rehearsal import rehearsed_training, unread_model
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.training.config import TrainConfig

FEW = 3
COMPARED = FEW + 2
STATES = list(Category).index(Category.OPTIMIZER_STATE)
OTHER = list(Category).index(Category.OTHER)
TEMPORARY = list(Category).index(Category.TEMPORARY)
LOAD = "load"
STEP_PHASES = ("forward", "backward")
CHECKS = "checks before the first step"

Levels = dict[Place, Sizes]


@dataclass(frozen=True)
class Wanted:
    """What is to be trained, and how: all that decides on its memory beside the model and the device.

    accumulated: whether a step has several batches, so that gradients are there while the next one runs.
    """

    quant: QuantConfig
    lora: LoraConfig
    rows: int
    tokens: int
    optimizer: str = "adamw"
    checkpointing: str | int = "full"
    accumulated: bool = False

    def changed(self, **settings: Any) -> Wanted:
        """The same with other settings."""
        return replace(self, **settings)


@dataclass(frozen=True)
class Forecast:
    """The predicted peak of live tensor bytes, in which phase and module it is, and what is alive then.

    model_bytes: of the model's own, adapters included. reserved: by an accelerator's allocator at its peak, None for a
    CPU. layers: with how many the model was rehearsed.
    """

    peak: int
    phase: str
    module: str | None
    by_category: dict[Category, int]
    model_bytes: int
    reserved: int | None
    layers: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        named = {category.value: size for category, size in self.by_category.items()}
        return {**vars(self), "by_category": named, "layers": list(self.layers)}


@dataclass(frozen=True)
class _Run:
    """Levels of one rehearsal, and the two sizes that are no level."""

    levels: Levels
    reserved: int
    model_bytes: int


@dataclass(frozen=True)
class _Loaded:
    model: Any
    levels: Levels
    model_bytes: int
    beside: int  # alive after loading, and not of the model: tables that packing keeps for the next weight
    checks: Levels  # of what only the first training of a model does, once it was trained


def layer_count(found: Any) -> int | None:
    """How many repeated layers a config says, None if it does not say it in the common way."""
    count = getattr(found.get_text_config(), "num_hidden_layers", None)
    return count if isinstance(count, int) else None


def _with_layers(found: Any, count: int) -> Any:
    changed = copy.deepcopy(found)
    text = changed.get_text_config()
    text.num_hidden_layers = count
    for name, value in list(vars(text).items()):
        if name.endswith("layer_types") and isinstance(value, list):
            setattr(text, name, value[:count])
    return changed


def _with_more(levels: Levels, category: int, size: int, phases: tuple[str | None, ...]) -> Levels:
    return {
        place: tuple(old + size * (number == category and place.phase in phases) for number, old in enumerate(sizes))
        for place, sizes in levels.items()
    }


def _with_all_kept(levels: Levels) -> Levels:
    """Workspaces that the first step's backward makes, and a device keeps, are there from the second forward on."""
    kept = max(sizes[OTHER] for sizes in levels.values())
    return {
        place: (*sizes[:OTHER], kept, *sizes[OTHER + 1 :]) if place.phase in STEP_PHASES else sizes
        for place, sizes in levels.items()
    }


class Forecasts:
    """Answers for one config; only within `fake_tensors(accelerator)`. `whole`: whether shortcuts were given up."""

    def __init__(self, found: Any, accelerator: bool) -> None:
        self._found, self._accelerator = found, accelerator
        self._layers = layer_count(found)
        self.whole = self._layers is None or self._layers <= COMPARED
        self._compared = self.whole
        self._models: dict[tuple[str, int | None], _Loaded] = {}
        self._answers: dict[str, Forecast] = {}
        self._asked: list[tuple[Wanted, Forecast]] = []

    def of(self, wanted: Wanted) -> Forecast:
        """The peak that training would reach, loading included. Raises what `rehearse_steps` does."""
        key = repr(wanted)
        if key not in self._answers:
            self._answers[key] = self._forecast(wanted)
            self._asked.append((wanted, self._answers[key]))
        return self._answers[key]

    def guess(self, wanted: Wanted, tokens: int, size: int, needed: Callable[[Forecast], int]) -> int | None:
        """About how many rows of so many tokens need `size`: by a straight line over the tokens of batches that were
        asked for with the same settings; None if that were not two yet."""
        points = {
            asked.rows * asked.tokens: needed(answer)
            for asked, answer in self._asked
            if asked.changed(rows=wanted.rows, tokens=wanted.tokens) == wanted
        }
        if len(points) < 2:
            return None
        (short, least), (long, most) = min(points.items()), max(points.items())
        return 1 if most <= least else int((short + (size - least) * (long - short) / (most - least)) // tokens)

    def _forecast(self, wanted: Wanted) -> Forecast:
        # How many blocks a number of bytes keeps depends on their number: there is no shortcut.
        if self.whole or isinstance(wanted.checkpointing, int):
            return self._told(self._run(wanted, self._layers), (self._layers,) if self._layers else ())
        assert self._layers is not None
        try:
            few, more = self._run(wanted, FEW), self._run(wanted, FEW + 1)
        except (ConfigError, TargetError):  # settings that name a layer which only the whole model has
            return self._told(self._run(wanted, self._layers), (self._layers,))
        if not self._compared:
            self._compared = True
            self.whole = not _same(_continued(few, more, COMPARED - FEW), self._run(wanted, COMPARED))
            if self.whole:
                return self._forecast(wanted)
        return self._told(_continued(few, more, self._layers - FEW), (FEW, FEW + 1))

    def _told(self, run: _Run, layers: tuple[int, ...]) -> Forecast:
        highest = peaks(run.levels)
        phase = max(highest, key=lambda name: sum(highest[name][1]))
        place, sizes = highest[phase]
        return Forecast(
            peak=sum(sizes),
            phase=phase or CHECKS,
            module=layer_named(place.module, self._layers or 0) or None,
            by_category=dict(zip(Category, sizes, strict=True)),
            model_bytes=run.model_bytes,
            reserved=max(run.reserved, sum(sizes)) if self._accelerator else None,
            layers=layers,
        )

    def _run(self, wanted: Wanted, layers: int | None) -> _Run:
        loaded = self._loaded(wanted.quant, wanted.lora, layers)
        one_step = isinstance(wanted.checkpointing, str)
        config = TrainConfig(
            steps=1 if one_step else 2,
            gradient_accumulation=2 if wanted.accumulated else 1,
            optimizer=wanted.optimizer,
            checkpointing=wanted.checkpointing,
        )
        profiler = fake_profiler(self._accelerator)
        with profiler:
            rehearsed_training(loaded.model, profiler, config, wanted.rows, wanted.tokens)
        assert profiler.trace is not None
        events = list(profiler.trace.timeline())
        levels = highest_levels(events, layers or 0)
        if not loaded.checks:
            loaded.checks.update({place: sizes for place, sizes in levels.items() if place.phase is None})
        levels = {**loaded.checks, **levels}
        states = max(sizes[STATES] for sizes in levels.values()) if one_step else 0
        reserved = replay(events).peak.reserved + states if self._accelerator else 0
        levels = _with_more(levels, STATES, states, STEP_PHASES)
        if one_step and self._accelerator:
            levels = _with_all_kept(levels)
        levels = _with_more(levels, OTHER, loaded.beside, tuple({place.phase for place in levels}))
        return _Run({**loaded.levels, **levels}, reserved, loaded.model_bytes)

    def _loaded(self, quant: QuantConfig, lora: LoraConfig, layers: int | None) -> _Loaded:
        key = (repr((quant, lora)), layers)
        if key not in self._models:
            found = self._found if layers in (None, self._layers) else _with_layers(self._found, layers or 0)
            profiler = fake_profiler(self._accelerator)
            with profiler:
                model = unread_model(found, quant, lora, profiler)
                profiler.track(model)
            assert profiler.trace is not None
            found_levels = highest_levels(profiler.trace.timeline(), layers or 0)
            levels = {place: _met_as_made(sizes) for place, sizes in found_levels.items() if place.phase == LOAD}
            own = own_bytes(model)
            self._models[key] = _Loaded(model, levels, own, profiler.trace.live_bytes() - own, {})
        return self._models[key]


def _met_as_made(sizes: Sizes) -> Sizes:
    """Tables that packing keeps are made by the first model that is loaded, and met by those after it."""
    changed = list(sizes)
    changed[TEMPORARY] += changed[OTHER]
    changed[OTHER] = 0
    return tuple(changed)


def own_bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers, tied ones once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum({id(part): part.nbytes() for tensor in tensors for part in storages_of(tensor)}.values())


def _continued(few: _Run, more: _Run, steps: int) -> _Run:
    return _Run(
        continued(few.levels, more.levels, steps),
        few.reserved + (more.reserved - few.reserved) * steps,
        few.model_bytes + (more.model_bytes - few.model_bytes) * steps,
    )


def _same(one: _Run, other: _Run) -> bool:
    """Whether the peaks of all phases are equal, and the model's bytes; an allocator's segments are not this exact."""
    found = [{phase: sum(sizes) for phase, (_, sizes) in peaks(run.levels).items()} for run in (one, other)]
    return found[0] == found[1] and one.model_bytes == other.model_bytes
