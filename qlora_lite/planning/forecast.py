"""`Forecaster`: predicts peaks for many batches and settings of one model from rehearsals of a few of its layers.

A model of L layers is rehearsed with three and with four of them, one step each, and extrapolated to L by straight
lines (layer_extrapolation.py). The second step differs from the first by the optimizer's states, which are added. Once,
five layers are rehearsed too: if that is not what the lines predict, or the model has no more layers than that, every
answer comes from a rehearsal of all layers. Fake models are made once for each setting, and trained on every batch that
is asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from qlora_lite.checkpoints.load import DISK, MEMORY
from qlora_lite.errors import ConfigError, TargetError
from qlora_lite.lora.config import LoraConfig
from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.storages import storages_of
from qlora_lite.offload.base_bytes import BaseBytes
from qlora_lite.planning.cuda_allocator import replay
from qlora_lite.planning.layer_extrapolation import (
    CategorySizes,
    SiteLevels,
    absolute_name,
    extrapolate,
    highest_by_site,
    phase_peaks,
)
from qlora_lite.planning.rehearsal import fake_profiler
from qlora_lite.planning.training_rehearsal import build_fake_model, run_fake_training
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.training.config import TrainConfig

FEWEST_LAYERS = 3  # extrapolated from this number and one more
VERIFIED_LAYERS = FEWEST_LAYERS + 2  # the number at which the lines are compared with a rehearsal
# Positions in CategorySizes.
OPTIMIZER_STATE = list(Category).index(Category.OPTIMIZER_STATE)
OTHER = list(Category).index(Category.OTHER)
TEMPORARY = list(Category).index(Category.TEMPORARY)
LOAD = "load"
STEP_PHASES = ("forward", "backward")
CHECKS = "checks before the first step"


@dataclass(frozen=True)
class TrainingSetup:
    """All settings that decide about the memory of training, apart from the model and the device.

    rows, tokens: the shape of a batch. checkpointing: as in `TrainConfig`; an int is a number of bytes. accumulated:
    whether a step has several batches, so that gradients are alive while the next batch runs. text_only, base:
    as in `load_quantized`.
    """

    quant: QuantConfig
    lora: LoraConfig
    rows: int
    tokens: int
    optimizer: str = "adamw"
    checkpointing: str | int = "full"
    accumulated: bool = False
    text_only: bool = False
    base: str = MEMORY


@dataclass(frozen=True)
class Forecast:
    """The predicted peak of live tensor bytes, its phase and module, and its split by category; sizes in bytes.

    model_bytes: parameters and buffers, adapters included. reserved: the peak of an accelerator's allocator; None for a
    CPU. layers: the numbers of layers that were rehearsed.
    on_disk: of the base, if it lies there; of these at most `resident_base` are in memory at a time, which the peak
    counts, and `read_a_batch` are read for a batch at most. The peak is an upper bound then.
    """

    peak: int
    phase: str
    module: str | None
    by_category: dict[Category, int]
    model_bytes: int
    reserved: int | None
    layers: tuple[int, ...]
    on_disk: int = 0
    resident_base: int = 0
    read_a_batch: int = 0

    def to_json(self) -> dict[str, object]:
        """Returns plain data for `json.dumps`."""
        named = {category.value: size for category, size in self.by_category.items()}
        return {**vars(self), "by_category": named, "layers": list(self.layers)}


@dataclass(frozen=True)
class _Rehearsed:
    """One rehearsal: its levels by allocation site, the bytes that the allocator reserves, those of the model, and what
    of its base could lie on disk."""

    levels: SiteLevels
    reserved: int
    model_bytes: int
    base: BaseBytes


@dataclass(frozen=True)
class _FakeModel:
    """A packed model on fake tensors.

    table_bytes: alive after loading, but not held by the model (tables that packing keeps for the next weight).
    check_levels: levels of the checks that only the first training of a model runs; empty before that.
    """

    model: nn.Module
    levels: SiteLevels
    model_bytes: int
    table_bytes: int
    check_levels: SiteLevels


def layer_count(model_config: Any) -> int | None:
    """Returns the number of repeated layers in a transformers config; None if it has no `num_hidden_layers`."""
    count = getattr(model_config.get_text_config(), "num_hidden_layers", None)
    return count if isinstance(count, int) else None


def _with_layers(model_config: Any, count: int) -> Any:
    changed = copy.deepcopy(model_config)
    text = changed.get_text_config()
    text.num_hidden_layers = count
    for name, value in list(vars(text).items()):
        if name.endswith("layer_types") and isinstance(value, list):
            setattr(text, name, value[:count])
    return changed


def _with_more(levels: SiteLevels, category: int, size: int, phases: tuple[str | None, ...]) -> SiteLevels:
    """Adds `size` bytes of a category to every site of these phases."""
    return {
        site: tuple(old + size * (number == category and site.phase in phases) for number, old in enumerate(sizes))
        for site, sizes in levels.items()
    }


def _with_workspaces(levels: SiteLevels) -> SiteLevels:
    """Adds the persistent workspaces of the first backward, which are alive from the second forward on."""
    kept = max(sizes[OTHER] for sizes in levels.values())
    return {
        site: (*sizes[:OTHER], kept, *sizes[OTHER + 1 :]) if site.phase in STEP_PHASES else sizes
        for site, sizes in levels.items()
    }


class Forecaster:
    """Forecasts for one model config. To be used within `fake_tensors(accelerator)`.

    rehearses_all_layers: whether extrapolation was given up.
    """

    def __init__(self, model_config: Any, accelerator: bool) -> None:
        self._model_config, self._accelerator = model_config, accelerator
        self._layers = layer_count(model_config)
        self.rehearses_all_layers = self._layers is None or self._layers <= VERIFIED_LAYERS
        self._verified = self.rehearses_all_layers
        self._models: dict[tuple[str, int | None], _FakeModel] = {}
        self._rehearsals: dict[tuple[str, int | None], _Rehearsed] = {}
        self._forecasts: dict[str, Forecast] = {}
        self._asked: list[tuple[TrainingSetup, Forecast]] = []

    def forecast(self, setup: TrainingSetup) -> Forecast:
        """Returns the peak that training would reach, loading included. Raises what `rehearse_steps` raises."""
        key = repr(setup)
        if setup.base == DISK and self._accelerator:
            raise ConfigError("a base on disk is computed with on a CPU; plan for one (--device cpu)")
        if key not in self._forecasts:
            self._forecasts[key] = self._new_forecast(setup)
            self._asked.append((setup, self._forecasts[key]))
        return self._forecasts[key]

    def guess_rows(self, setup: TrainingSetup, tokens: int, size: int, needed: Callable[[Forecast], int]) -> int | None:
        """Guesses how many rows of `tokens` tokens need `size` bytes; None with fewer than two forecasts to go by.

        The guess is a straight line over the tokens of the batches forecast so far with the same other settings.
        """
        points = {
            asked.rows * asked.tokens: needed(answer)
            for asked, answer in self._asked
            if replace(asked, rows=setup.rows, tokens=setup.tokens) == setup
        }
        if len(points) < 2:
            return None
        (short, least), (long, most) = min(points.items()), max(points.items())
        return 1 if most <= least else int((short + (size - least) * (long - short) / (most - least)) // tokens)

    def _new_forecast(self, setup: TrainingSetup) -> Forecast:
        # How many blocks a budget of bytes keeps depends on the number of layers, so it cannot be extrapolated.
        if self.rehearses_all_layers or isinstance(setup.checkpointing, int):
            return self._summary(setup, self._rehearse(setup, self._layers), (self._layers,) if self._layers else ())
        assert self._layers is not None
        try:
            few, one_more = self._rehearse(setup, FEWEST_LAYERS), self._rehearse(setup, FEWEST_LAYERS + 1)
        except (ConfigError, TargetError):  # the settings name a layer that only the whole model has
            return self._summary(setup, self._rehearse(setup, self._layers), (self._layers,))
        if not self._verified:
            self._verified = True
            expected = _extrapolated(few, one_more, VERIFIED_LAYERS - FEWEST_LAYERS)
            self.rehearses_all_layers = not _same(expected, self._rehearse(setup, VERIFIED_LAYERS))
            if self.rehearses_all_layers:
                return self._new_forecast(setup)
        whole = _extrapolated(few, one_more, self._layers - FEWEST_LAYERS)
        return self._summary(setup, whole, (FEWEST_LAYERS, FEWEST_LAYERS + 1))

    def _summary(self, setup: TrainingSetup, run: _Rehearsed, layers: tuple[int, ...]) -> Forecast:
        highest = phase_peaks(run.levels)
        if setup.base == DISK:  # packed to disk, a base takes no memory while it is loaded
            highest = {name: peak for name, peak in highest.items() if name != LOAD}
        phase = max(highest, key=lambda name: sum(highest[name][1]))
        site, sizes = highest[phase]
        found = Forecast(
            peak=sum(sizes),
            phase=phase or CHECKS,
            module=absolute_name(site.module, self._layers or 0) or None,
            by_category=dict(zip(Category, sizes, strict=True)),
            model_bytes=run.model_bytes,
            reserved=max(run.reserved, sum(sizes)) if self._accelerator else None,
            layers=layers,
        )
        return found if setup.base == MEMORY else _with_base_on_disk(found, run.base)

    def _rehearse(self, setup: TrainingSetup, layers: int | None) -> _Rehearsed:
        key = repr(replace(setup, base=MEMORY)), layers  # what is rehearsed does not depend on where the base is
        if key not in self._rehearsals:
            self._rehearsals[key] = self._new_rehearsal(setup, layers)
        return self._rehearsals[key]

    def _new_rehearsal(self, setup: TrainingSetup, layers: int | None) -> _Rehearsed:
        fake = self._fake_model(setup, layers)
        one_step = isinstance(setup.checkpointing, str)
        config = TrainConfig(
            steps=1 if one_step else 2,
            gradient_accumulation=2 if setup.accumulated else 1,
            optimizer=setup.optimizer,
            checkpointing=setup.checkpointing,
        )
        profiler = fake_profiler(self._accelerator)
        with profiler:
            run_fake_training(fake.model, profiler, config, setup.rows, setup.tokens)
        assert profiler.trace is not None
        events = list(profiler.trace.timeline())
        levels = highest_by_site(events, layers or 0)
        if not fake.check_levels:
            fake.check_levels.update({site: sizes for site, sizes in levels.items() if site.phase is None})
        levels = {**fake.check_levels, **levels}
        states = max(sizes[OPTIMIZER_STATE] for sizes in levels.values()) if one_step else 0
        reserved = replay(events).peak.reserved + states if self._accelerator else 0
        levels = _with_more(levels, OPTIMIZER_STATE, states, STEP_PHASES)
        if one_step and self._accelerator:
            levels = _with_workspaces(levels)
        levels = _with_more(levels, OTHER, fake.table_bytes, tuple({site.phase for site in levels}))
        return _Rehearsed({**fake.levels, **levels}, reserved, fake.model_bytes, BaseBytes.of(fake.model))

    def _fake_model(self, setup: TrainingSetup, layers: int | None) -> _FakeModel:
        key = (repr((setup.quant, setup.lora, setup.text_only)), layers)
        if key not in self._models:
            config = self._model_config
            if layers not in (None, self._layers):
                config = _with_layers(config, layers or 0)
            profiler = fake_profiler(self._accelerator)
            with profiler:
                model = build_fake_model(config, setup.quant, setup.lora, profiler, text_only=setup.text_only)
                profiler.track(model)
            assert profiler.trace is not None
            found = highest_by_site(profiler.trace.timeline(), layers or 0)
            levels = {site: _with_tables_as_temporaries(sizes) for site, sizes in found.items() if site.phase == LOAD}
            size = parameter_and_buffer_bytes(model)
            self._models[key] = _FakeModel(model, levels, size, profiler.trace.live_bytes() - size, {})
        return self._models[key]


def _with_tables_as_temporaries(sizes: CategorySizes) -> CategorySizes:
    """Counts OTHER as TEMPORARY: tables that packing keeps are created by the first model and preexist for the next."""
    changed = list(sizes)
    changed[TEMPORARY] += changed[OTHER]
    changed[OTHER] = 0
    return tuple(changed)


def parameter_and_buffer_bytes(model: nn.Module) -> int:
    """Returns the bytes of a model's parameters and buffers, counting tied ones once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum({id(part): part.nbytes() for tensor in tensors for part in storages_of(tensor)}.values())


def _extrapolated(few: _Rehearsed, one_more: _Rehearsed, extra_layers: int) -> _Rehearsed:
    return _Rehearsed(
        extrapolate(few.levels, one_more.levels, extra_layers),
        few.reserved + (one_more.reserved - few.reserved) * extra_layers,
        few.model_bytes + (one_more.model_bytes - few.model_bytes) * extra_layers,
        few.base.with_more_layers(one_more.base, extra_layers),
    )


def _with_base_on_disk(forecast: Forecast, base: BaseBytes) -> Forecast:
    """Returns the forecast without the bytes on disk, and with the most of them that are in memory at a time."""
    saved, by_category = base.total - base.resident, dict(forecast.by_category)
    by_category[Category.QUANT_STATE] -= base.statistics
    by_category[Category.BASE_WEIGHT] += base.resident - base.codes
    return replace(
        forecast,
        peak=forecast.peak - saved,
        by_category=by_category,
        model_bytes=forecast.model_bytes - saved,
        on_disk=base.total,
        resident_base=base.resident,
        read_a_batch=base.read_a_batch,
    )


def _same(one: _Rehearsed, other: _Rehearsed) -> bool:
    """Returns whether the peaks of all phases and the model's bytes are equal.

    Reserved bytes are not compared: an allocator's segments do not grow by straight lines to the byte.
    """
    found = [{phase: sum(sizes) for phase, (_, sizes) in phase_peaks(run.levels).items()} for run in (one, other)]
    return found[0] == found[1] and one.model_bytes == other.model_bytes
