"""`plan`: what fits into a memory, from a config alone: the given setup, the largest batches, and settings that help.

All of it is predicted by a `Forecaster`. A device needs more than the tensors that a rehearsal shows: an accelerator
holds its context, the process of a CPU the interpreter and its libraries. These bytes are given as
`DeviceMemory.overhead`, and a plan shows them as a line of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from qlora_lite.checkpoints.load import DISK, MEMORY
from qlora_lite.errors import ConfigError, QLoRAError, RehearsalError
from qlora_lite.planning.forecast import Forecast, Forecaster, TrainingSetup, parameter_and_buffer_bytes
from qlora_lite.planning.rehearsal import fake_profiler, fake_tensors
from qlora_lite.planning.training_rehearsal import build_fake_model
from qlora_lite.positions import longest_sequence
from qlora_lite.quantization.formats import FORMATS, UNPACKED, embedding_formats
from qlora_lite.training.loop import check_batch_shape

# The search for the largest batch ends here; nobody trains with more rows.
MAX_ROWS = 4096
USUAL_LENGTHS = (512, 2048, 8192)
# Activation checkpointing within a byte budget adds this margin to the costs that it measures in the first step.
BUDGET_MARGIN = 1.03
# The search tries at most this many times the rows that are known to fit.
MAX_GROWTH = 64
ADAMW_BYTES = 8  # two fp32 moments for each adapter value
ADAMW8BIT_BYTES = 2  # two 8-bit moments, and statistics that are not counted here


@dataclass(frozen=True)
class DeviceMemory:
    """The memory of a device: `size` bytes in all, of which `overhead` are taken by other things than tensors.

    accelerator: whether it is an accelerator's. overhead_source: `given`, `measured` or `assumed`. in_shares: bytes
    that a base in shares of several processes takes less than a whole one (sharding/count.py).
    """

    size: int
    overhead: int
    accelerator: bool
    overhead_source: str = "given"
    in_shares: int = 0

    def needed(self, forecast: Forecast) -> int:
        """Returns the bytes needed: reserved by an accelerator's allocator, or alive on a CPU, plus the overhead, less
        what a base in shares saves.
        """
        return (forecast.peak if forecast.reserved is None else forecast.reserved) + self.overhead - self.in_shares


@dataclass(frozen=True)
class LargestBatch:
    """The largest batch with rows of `tokens`; 0 rows if not even one fits. more: the search ended at `MAX_ROWS`."""

    tokens: int
    rows: int
    needed: int | None
    more: bool


@dataclass(frozen=True)
class Recomputation:
    """The activation checkpointing with the least recomputation that fits: `none`, a number of bytes, or `full`.

    None if nothing fits. needed: bytes, at most.
    """

    checkpointing: str | int | None
    needed: int | None


@dataclass(frozen=True)
class Alternative:
    """The change in the predicted peak, in bytes, if one setting changes; None, and the reason, if it cannot."""

    change: str
    difference: int | None
    why_not: str | None = None


@dataclass(frozen=True)
class Plan:
    """The answers of `plan`.

    rehearsed_whole: whether all layers were rehearsed. counted: a lower bound, by part, where the model cannot be
    rehearsed; not_rehearsed gives the reason. Both are None otherwise.
    """

    setup: TrainingSetup
    memory: DeviceMemory
    forecast: Forecast | None
    needed: int | None
    least: Recomputation | None
    largest: tuple[LargestBatch, ...]
    alternatives: tuple[Alternative, ...]
    rehearsed_whole: bool
    counted: dict[str, int] | None = None
    not_rehearsed: str | None = None

    @property
    def fits(self) -> bool | None:
        """Whether the setup fits; None if that is unknown."""
        if self.needed is not None:
            return self.needed <= self.memory.size
        assert self.counted is not None
        least = sum(self.counted.values()) + self.memory.overhead - self.memory.in_shares
        return False if least > self.memory.size else None

    def to_json(self) -> dict[str, object]:
        """Returns plain data for `json.dumps`; sizes in bytes."""
        setup = self.setup
        return {
            "fits": self.fits,
            "memory": asdict(self.memory),
            "wanted": {
                "rows": setup.rows,
                "tokens": setup.tokens,
                "rank": setup.lora.rank,
                "format": setup.quant.format,
                "embedding_format": setup.quant.embedding_format,
                "double_quant": setup.quant.double_quant,
                "optimizer": setup.optimizer,
                "checkpointing": setup.checkpointing,
                "text_only": setup.text_only,
                "base_in": setup.base,
            },
            "needed": self.needed,
            "forecast": None if self.forecast is None else self.forecast.to_json(),
            "least_recomputation": None if self.least is None else asdict(self.least),
            "largest": [asdict(entry) for entry in self.largest],
            "gains": [asdict(alternative) for alternative in self.alternatives],
            "rehearsed_whole": self.rehearsed_whole,
            "counted": self.counted,
            "not_rehearsed": self.not_rehearsed,
        }


def plan(model_config: Any, setup: TrainingSetup, memory: DeviceMemory, lengths: Sequence[int] | None = None) -> Plan:
    """Plans what of training a model of this config (from `read_config`) fits into `memory`.

    lengths: the numbers of tokens whose largest batch is searched for; None for `usual_lengths`.
    For a model that cannot be rehearsed, the plan has counted bytes only. Raises ConfigError, TargetError and
    CheckpointError where the real run would.
    """
    check_batch_shape(model_config, setup.rows, setup.tokens)
    lengths = usual_lengths(model_config, setup.tokens) if lengths is None else lengths
    for length in lengths:
        check_batch_shape(model_config, 1, length)
    try:
        with fake_tensors(memory.accelerator):
            forecaster = Forecaster(model_config, memory.accelerator)
            forecast = forecaster.forecast(setup)
            least = least_recomputation(forecaster, setup, memory)
            largest = tuple(largest_batch(forecaster, setup, memory, length) for length in lengths)
            alternatives = tuple(
                _alternative(forecaster, setup, *change) for change in _changes(setup, memory.accelerator)
            )
    except RehearsalError as error:
        counted = minimum_bytes(model_config, setup)
        return Plan(setup, memory, None, None, None, (), (), False, counted, str(error))
    needed = memory.needed(forecast)
    return Plan(setup, memory, forecast, needed, least, largest, alternatives, forecaster.rehearses_all_layers)


def usual_lengths(model_config: Any, tokens: int) -> list[int]:
    """Returns `tokens`, and of 512, 2,048 and 8,192 those that the model can take, in ascending order."""
    longest = longest_sequence(model_config) or USUAL_LENGTHS[-1]
    return sorted({tokens, *(length for length in USUAL_LENGTHS if length <= longest)})


def minimum_bytes(model_config: Any, setup: TrainingSetup) -> dict[str, int]:
    """Returns a lower bound of the bytes of training: the packed model with adapters, gradients, optimizer states.

    Serves models that can be loaded on fake tensors but not trained on them. Raises RehearsalError for others.
    """
    with fake_tensors(), fake_profiler() as profiler:
        model = build_fake_model(model_config, setup.quant, setup.lora, profiler, text_only=setup.text_only)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        values = sum(parameter.numel() for parameter in trained)
        state = ADAMW_BYTES if setup.optimizer == "adamw" else ADAMW8BIT_BYTES
        return {
            "model": parameter_and_buffer_bytes(model),
            "gradients": sum(parameter.nbytes for parameter in trained),
            "optimizer_state": state * values,
        }


def least_recomputation(forecaster: Forecaster, setup: TrainingSetup, memory: DeviceMemory) -> Recomputation:
    """Returns the least recomputation with which the setup fits.

    A budget of bytes bounds the bytes alive above those of the model (`TrainConfig.checkpointing`). A budget needs at
    most needed(full) - above(full) + budget, where above(full) are these bytes with full recomputation.
    """
    for checkpointing in ("none", "full"):
        forecast = forecaster.forecast(replace(setup, checkpointing=checkpointing))
        needed = memory.needed(forecast)
        if needed > memory.size:
            continue
        if checkpointing == "none":
            return Recomputation(checkpointing, needed)
        above = forecast.peak - forecast.model_bytes
        budget = above + memory.size - needed
        if budget < above * BUDGET_MARGIN:
            return Recomputation(checkpointing, needed)
        return Recomputation(budget, needed + budget - above)
    return Recomputation(None, None)


def checkpointing_within(model_config: Any, setup: TrainingSetup, memory: DeviceMemory) -> Recomputation:
    """Returns the least recomputation with which the setup fits.

    Raises ConfigError, with the nearest batch that fits, if none does; RehearsalError for a model that cannot be
    rehearsed.
    """
    check_batch_shape(model_config, setup.rows, setup.tokens)
    with fake_tensors(memory.accelerator):
        forecaster = Forecaster(model_config, memory.accelerator)
        least = least_recomputation(forecaster, setup, memory)
        if least.checkpointing is not None:
            return least
        full = replace(setup, checkpointing="full")
        needed = memory.needed(forecaster.forecast(full))
        rows = largest_batch(forecaster, full, memory, setup.tokens).rows
        tokens = setup.tokens
        while rows == 0 and tokens >= 4:
            tokens //= 2
            rows = min(1, largest_batch(forecaster, replace(full, rows=1), memory, tokens).rows)
    nearest = f"the nearest batch that fits is {rows} x {tokens} tokens" if rows else "not even two tokens fit"
    raise ConfigError(
        f"{setup.rows} x {setup.tokens} tokens need {needed} bytes even if every block is recomputed, "
        f"but only {memory.size} are available; {nearest}"
    )


def largest_batch(forecaster: Forecaster, setup: TrainingSetup, memory: DeviceMemory, tokens: int) -> LargestBatch:
    """Returns the largest batch with rows of `tokens` that fits by prediction, while one row more does not."""
    needed: dict[int, int] = {}

    def fits(rows: int) -> bool:
        needed[rows] = memory.needed(forecaster.forecast(replace(setup, rows=rows, tokens=tokens)))
        return needed[rows] <= memory.size

    first = forecaster.guess_rows(setup, tokens, memory.size, memory.needed)
    if first is None and fits(1):
        first = forecaster.guess_rows(setup, tokens, memory.size, memory.needed)
    rows = largest_fitting(fits, lambda rows: needed[rows], memory.size, first or 1)
    return LargestBatch(tokens, rows, needed.get(rows), rows == MAX_ROWS)


def largest_fitting(fits: Callable[[int], bool], needed: Callable[[int], int], size: int, first: int) -> int:
    """Returns the largest number up to `MAX_ROWS` that fits, 0 if 1 does not. Begins with `first`.

    fits(n) must hold for all smaller numbers too. needed(n): the bytes of a number that was tried. Between tried
    numbers the search follows a straight line through them, or halves the interval.
    """
    low, high, tried = 0, MAX_ROWS + 1, list[int]()
    number = min(max(first, 1), MAX_ROWS)
    while high - low > 1:
        tried.append(number)
        if fits(number):
            low = number
        else:
            high = number
        if len(tried) == 1:  # a first guess is off by a row or two
            number = number + 1 if low else number - 1
        elif high in tried and len(tried) % 2:  # an allocator reserves in steps, so a line may mislead
            number = (low + high) // 2
        else:
            one, other = (max(low, min(tried)), high) if high in tried else (min(tried), max(tried))
            slope = (needed(other) - needed(one)) / max(other - one, 1)
            number = int(one + (size - needed(one)) / slope) if slope > 0 else 2 * number
            number = min(number, MAX_GROWTH * max(low, 1))
            if high not in tried:  # or creep row by row
                number = max(number, low + 2 ** (len(tried) - 2))
        number = min(max(number, low + 1), high - 1)
    return low


def _changes(setup: TrainingSetup, accelerator: bool) -> list[tuple[str, TrainingSetup]]:
    """Returns single changes of the settings that may need less memory."""
    quant, lora = setup.quant, setup.lora
    found = []
    if quant.embedding_format == UNPACKED:
        rows = embedding_formats()[0]
        found.append((f"{rows} embedding and head", replace(setup, quant=replace(quant, embedding_format=rows))))
    row, smallest = FORMATS.get(quant.format), min(FORMATS.values(), key=lambda row: row.bits)
    if row is None or row.bits > smallest.bits:
        packed = replace(quant, format=smallest.name, int8_activations=False)
        found.append((f"{smallest.name} in place of {quant.format}", replace(setup, quant=packed)))
    elif row.nests and not quant.double_quant:
        found.append(("double quantization", replace(setup, quant=replace(quant, double_quant=True))))
    if setup.optimizer == "adamw":
        found.append(("adamw8bit", replace(setup, optimizer="adamw8bit")))
    if setup.checkpointing != "full":
        found.append(("checkpointing full", replace(setup, checkpointing="full")))
    if setup.base == MEMORY and not accelerator:
        found.append(("base on disk", replace(setup, base=DISK)))
    if lora.rank > 1:
        smaller = replace(lora, rank=lora.rank // 2, alpha=lora.alpha / 2)
        found.append((f"rank {lora.rank // 2} in place of {lora.rank}", replace(setup, lora=smaller)))
    return found


def _alternative(forecaster: Forecaster, setup: TrainingSetup, change: str, changed: TrainingSetup) -> Alternative:
    try:
        return Alternative(change, forecaster.forecast(changed).peak - forecaster.forecast(setup).peak)
    except QLoRAError as error:
        return Alternative(change, None, str(error))
