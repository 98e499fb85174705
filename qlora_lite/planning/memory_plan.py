"""`plan`: what fits into a memory, from a config alone: the wanted batch, the largest batches, and what would help.

Everything is predicted by `Forecasts`. Beside tensors a device needs more, which no rehearsal shows: an accelerator
its context, a CPU's process the interpreter and its libraries. That is given (`Memory.beside`) and stands in the
result as a line of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from qlora_lite import architecture
from qlora_lite.errors import ConfigError, QLoRAError, RehearsalError
from qlora_lite.planning.forecast import Forecast, Forecasts, Wanted, own_bytes
from qlora_lite.planning.rehearsal import fake_profiler, fake_tensors
from qlora_lite.planning.training_rehearsal import unread_model
from qlora_lite.quantization.formats import DEFAULT_FORMAT, FORMATS, UNPACKED, embedding_formats
from qlora_lite.training.loop import check_batch_shape

# Longer searches end here: such a batch is one that nobody trains with.
MOST_ROWS = 4096
LENGTHS = (512, 2048, 8192)
LONGEST = LENGTHS[-1]
# What `Dial` adds to the first step's bytes when it decides whether a number of them can be met, rounded up.
DIAL_MARGIN = 1.03
# At most so many times the rows that are known to fit are tried next.
STRIDE = 64
ADAMW_BYTES = 8  # two fp32 moments for each adapter value; adamw8bit has two bytes at least
ADAMW8BIT_BYTES = 2


@dataclass(frozen=True)
class Memory:
    """A device's memory: all of it, what is taken beside tensors, both in bytes, and whether it is an accelerator's.

    beside_is: where the second is from: `given`, `measured` or `assumed`.
    """

    size: int
    beside: int
    accelerator: bool
    beside_is: str = "given"

    def needed(self, forecast: Forecast) -> int:
        """What the device must have for it: reserved by an accelerator's allocator, or alive, and what is beside."""
        return (forecast.peak if forecast.reserved is None else forecast.reserved) + self.beside


@dataclass(frozen=True)
class Largest:
    """The largest batch of rows of `tokens`; 0 if not even one row fits, `more` if the search ended before its end."""

    tokens: int
    rows: int
    needed: int | None
    more: bool


@dataclass(frozen=True)
class Recomputation:
    """The least that fits: `none`, a number of bytes, `full`; None if nothing does. needed: at most."""

    checkpointing: str | int | None
    needed: int | None


@dataclass(frozen=True)
class Gain:
    """What one change of the settings does to the predicted peak; None, and why, where it cannot be made."""

    change: str
    difference: int | None
    why_not: str | None = None


@dataclass(frozen=True)
class Plan:
    """The answers. not_rehearsed: why only `counted` bytes are known, which are needed at least; None if all is."""

    wanted: Wanted
    memory: Memory
    forecast: Forecast | None
    needed: int | None
    least: Recomputation | None
    largest: tuple[Largest, ...]
    gains: tuple[Gain, ...]
    whole: bool
    counted: dict[str, int] | None = None
    not_rehearsed: str | None = None

    @property
    def fits(self) -> bool | None:
        """Whether the wanted batch fits; None if that is not known."""
        if self.needed is not None:
            return self.needed <= self.memory.size
        assert self.counted is not None
        return False if sum(self.counted.values()) + self.memory.beside > self.memory.size else None

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`; sizes in bytes."""
        wanted = self.wanted
        return {
            "fits": self.fits,
            "memory": asdict(self.memory),
            "wanted": {
                "rows": wanted.rows,
                "tokens": wanted.tokens,
                "rank": wanted.lora.rank,
                "format": wanted.quant.format,
                "embedding_format": wanted.quant.embedding_format,
                "double_quant": wanted.quant.double_quant,
                "optimizer": wanted.optimizer,
                "checkpointing": wanted.checkpointing,
            },
            "needed": self.needed,
            "forecast": None if self.forecast is None else self.forecast.to_json(),
            "least_recomputation": None if self.least is None else asdict(self.least),
            "largest": [asdict(entry) for entry in self.largest],
            "gains": [asdict(gain) for gain in self.gains],
            "rehearsed_whole": self.whole,
            "counted": self.counted,
            "not_rehearsed": self.not_rehearsed,
        }


def plan(found: Any, wanted: Wanted, memory: Memory, lengths: Sequence[int] | None = None) -> Plan:
    """What fits into `memory` of training a model of this config (`read_config`).

    lengths: for which the largest batch is looked for; None for `usual_lengths`.
    A model that cannot be rehearsed has a plan of what is counted alone. Raises ConfigError, TargetError and
    CheckpointError as the real run would.
    """
    check_batch_shape(found, wanted.rows, wanted.tokens)
    lengths = usual_lengths(found, wanted.tokens) if lengths is None else lengths
    for length in lengths:
        check_batch_shape(found, 1, length)
    try:
        with fake_tensors(memory.accelerator):
            forecasts = Forecasts(found, memory.accelerator)
            forecast = forecasts.of(wanted)
            least = least_recomputation(forecasts, wanted, memory)
            largest = tuple(largest_batch(forecasts, wanted, memory, length) for length in lengths)
            gains = tuple(_gain(forecasts, wanted, *change) for change in _changes(wanted))
    except RehearsalError as error:
        counted = counted_bytes(found, wanted)
        return Plan(wanted, memory, None, None, None, (), (), False, counted, str(error))
    return Plan(wanted, memory, forecast, memory.needed(forecast), least, largest, gains, forecasts.whole)


def usual_lengths(found: Any, tokens: int) -> list[int]:
    """512, 2,048 and 8,192 tokens as far as the model goes, and the wanted number."""
    longest = min(architecture.longest_sequence(found) or LONGEST, LONGEST)
    return sorted({tokens, *(length for length in LENGTHS if length <= longest)})


def counted_bytes(found: Any, wanted: Wanted) -> dict[str, int]:
    """What is resident in any case: the packed model with adapters, their gradients and the optimizer's states.

    Of a model that can be loaded on fake tensors though not trained on them; else RehearsalError.
    """
    with fake_tensors(), fake_profiler() as profiler:
        model = unread_model(found, wanted.quant, wanted.lora, profiler)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        values = sum(parameter.numel() for parameter in trained)
        state = ADAMW_BYTES if wanted.optimizer == "adamw" else ADAMW8BIT_BYTES
        return {
            "model": own_bytes(model),
            "gradients": sum(parameter.nbytes for parameter in trained),
            "optimizer_state": state * values,
        }


def least_recomputation(forecasts: Forecasts, wanted: Wanted, memory: Memory) -> Recomputation:
    """The least recomputation with which the wanted batch fits.

    A number of bytes bounds what is alive above the model's own (`TrainConfig.checkpointing`), so what it needs is at
    most what recomputing everything needs, and that number in the place of what is above the model then.
    """
    for kind in ("none", "full"):
        forecast = forecasts.of(wanted.changed(checkpointing=kind))
        needed = memory.needed(forecast)
        if needed > memory.size:
            continue
        if kind == "none":
            return Recomputation(kind, needed)
        above = forecast.peak - forecast.model_bytes
        budget = above + memory.size - needed
        if budget < above * DIAL_MARGIN:
            return Recomputation(kind, needed)
        return Recomputation(budget, needed + budget - above)
    return Recomputation(None, None)


def checkpointing_within(found: Any, wanted: Wanted, memory: Memory) -> Recomputation:
    """The least recomputation with which the wanted batch fits; ConfigError, with the nearest that does, if none.

    RehearsalError for a model that cannot be rehearsed.
    """
    check_batch_shape(found, wanted.rows, wanted.tokens)
    with fake_tensors(memory.accelerator):
        forecasts = Forecasts(found, memory.accelerator)
        least = least_recomputation(forecasts, wanted, memory)
        if least.checkpointing is not None:
            return least
        full = wanted.changed(checkpointing="full")
        needed = memory.needed(forecasts.of(full))
        rows = largest_batch(forecasts, full, memory, wanted.tokens).rows
        tokens = wanted.tokens
        while rows == 0 and tokens >= 4:
            tokens //= 2
            rows = min(1, largest_batch(forecasts, full.changed(rows=1), memory, tokens).rows)
    nearest = f"the nearest batch that fits is {rows} x {tokens} tokens" if rows else "not even two tokens fit"
    raise ConfigError(
        f"{wanted.rows} x {wanted.tokens} tokens need {needed} bytes even if every block is recomputed, "
        f"and there are {memory.size}; {nearest}"
    )


def largest_batch(forecasts: Forecasts, wanted: Wanted, memory: Memory, tokens: int) -> Largest:
    """The largest batch of rows of so many tokens that fits: it does by prediction, and one row more does not."""
    needed: dict[int, int] = {}

    def fits(rows: int) -> bool:
        needed[rows] = memory.needed(forecasts.of(wanted.changed(rows=rows, tokens=tokens)))
        return needed[rows] <= memory.size

    first = forecasts.guess(wanted, tokens, memory.size, memory.needed)
    if first is None and fits(1):
        first = forecasts.guess(wanted, tokens, memory.size, memory.needed)
    rows = most_that_fits(fits, lambda rows: needed[rows], memory.size, first or 1)
    return Largest(tokens, rows, needed.get(rows), rows == MOST_ROWS)


def most_that_fits(fits: Callable[[int], bool], needed: Callable[[int], int], size: int, first: int) -> int:
    """The largest number up to `MOST_ROWS` that fits, 0 if 1 does not, by straight lines between those asked for.

    `needed(n)` of a number that was asked for. What fits, fits with fewer rows too.
    """
    low, high, asked = 0, MOST_ROWS + 1, list[int]()
    number = min(max(first, 1), MOST_ROWS)
    while high - low > 1:
        asked.append(number)
        if fits(number):
            low = number
        else:
            high = number
        if len(asked) == 1:  # a first guess is off by a row or two
            number = number + 1 if low else number - 1
        elif high in asked and len(asked) % 2:  # what an allocator reserves goes in steps: no line is to be trusted
            number = (low + high) // 2
        else:
            one, other = (max(low, min(asked)), high) if high in asked else (min(asked), max(asked))
            slope = (needed(other) - needed(one)) / max(other - one, 1)
            number = int(one + (size - needed(one)) / slope) if slope > 0 else 2 * number
            number = min(number, STRIDE * max(low, 1))
            if high not in asked:  # nor is a line to be followed row by row
                number = max(number, low + 2 ** (len(asked) - 2))
        number = min(max(number, low + 1), high - 1)
    return low


def _changes(wanted: Wanted) -> list[tuple[str, Wanted]]:
    """Single changes of the settings that may need less."""
    quant, lora = wanted.quant, wanted.lora
    found = []
    if quant.embedding_format == UNPACKED:
        rows = embedding_formats()[0]
        found.append((f"{rows} embedding and head", wanted.changed(quant=replace(quant, embedding_format=rows))))
    row, smallest = FORMATS.get(quant.format), FORMATS[DEFAULT_FORMAT]
    if row is None or row.bits > smallest.bits:
        packed = replace(quant, format=smallest.name, int8_activations=False)
        found.append((f"{smallest.name} in place of {quant.format}", wanted.changed(quant=packed)))
    elif row.nests and not quant.double_quant:
        found.append(("double quantization", wanted.changed(quant=replace(quant, double_quant=True))))
    if wanted.optimizer == "adamw":
        found.append(("adamw8bit", wanted.changed(optimizer="adamw8bit")))
    if wanted.checkpointing != "full":
        found.append(("checkpointing full", wanted.changed(checkpointing="full")))
    if lora.rank > 1:
        smaller = replace(lora, rank=lora.rank // 2, alpha=lora.alpha / 2)
        found.append((f"rank {lora.rank // 2} in place of {lora.rank}", wanted.changed(lora=smaller)))
    return found


def _gain(forecasts: Forecasts, wanted: Wanted, change: str, changed: Wanted) -> Gain:
    try:
        return Gain(change, forecasts.of(changed).peak - forecasts.of(wanted).peak)
    except QLoRAError as error:
        return Gain(change, None, str(error))
