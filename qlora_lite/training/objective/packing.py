"""Whether a model computes the examples of packed rows as it computes each alone."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from qlora_lite.compute.devices import is_out_of_memory
from qlora_lite.data.batching import Batch
from qlora_lite.errors import ConfigError, QLoRAError
from qlora_lite.training.objective.made_up_rows import (
    MadeUpRows,
    changes,
    length_within,
    states_of,
    undisturbed,
    was_rehearsed,
)
from qlora_lite.training.objective.task_losses import task_loss

# Made-up rows: examples longer than convolutions reach, whose lengths are no multiples of the sizes of blocks.
MADE_UP_LENGTHS = (19, 23, 17)
# Of the median token. In bf16, 30 layers and eight layers of experts differ by 0.01 at most.
ALONE_TOLERANCE = 0.05
WITHOUT_PACKING = "train with packing=False, and give position_ids only with packed rows"

_rehearsed: WeakSet[nn.Module] = WeakSet()


def is_packed(batch: Batch) -> bool:
    """Whether a batch is laid out like one of `batches` with packing, however many examples its rows hold."""
    positions = batch.get("position_ids")
    return positions is not None and positions.dim() == 2 and "attention_mask" not in batch


def _packed_states(model: nn.Module, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """Returns `states_of` packed rows of examples of these lengths. Raises ConfigError if the model takes no such."""
    positions = torch.cat([torch.arange(length, device=tokens.device) for length in lengths])
    try:
        return states_of(model, {"input_ids": tokens, "position_ids": positions.repeat(len(tokens), 1)})
    except Exception as error:  # the code of any model may raise anything
        if isinstance(error, QLoRAError) or is_out_of_memory(error) or isinstance(tokens, FakeTensor):
            raise
        why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ConfigError(f"a {type(model).__name__} does not take packed rows ({why}); {WITHOUT_PACKING}") from error


@torch.no_grad()
def check_packing(model: nn.Module, batch: Batch, rows: int) -> None:
    """Raises ConfigError if a model computes packed examples other than alone, so that batches like this are wrong.

    This is tried on made-up rows, whatever the batch holds. The hidden states of the second of three examples must not
    change with the tokens of its neighbours, except by rounding: if they change with those of another row, they may
    change by a few times as much. They must also be those of the example in a row of its own, up to rounding.
    The model and the random states are afterwards as before.
    rows: of the made-up batch; 1, or 2 for batches of several rows, for which some attention functions do not pack.
    """
    if task_loss(model, batch) is not None:
        raise ConfigError(
            f"rows of several examples are for causal language models, and a {type(model).__name__} has an answer for "
            f"each row; {WITHOUT_PACKING}"
        )
    is_fake = isinstance(batch["input_ids"], FakeTensor)
    if is_fake and was_rehearsed(model, _rehearsed):
        return
    made_up, lengths = MadeUpRows(model, batch), length_within(model, MADE_UP_LENGTHS)
    length, second = sum(lengths), slice(lengths[0], sum(lengths[:2]))
    tokens, others = made_up.tokens(rows, length), made_up.tokens(rows, length, 1)
    others[:, second] = tokens[:, second]
    with undisturbed(model):
        packed = _packed_states(model, tokens, lengths)[:, second]
        among_others = _packed_states(model, others, lengths)[:, second]
        alone = _packed_states(model, tokens[:, second], lengths[1:2])
        if is_fake:
            return
        if not all(states.isfinite().all() for states in (packed, among_others, alone)):
            raise ConfigError(f"a {type(model).__name__} computes NaN or infinity for packed rows; {WITHOUT_PACKING}")
        seen = made_up.change(among_others, packed, length, lambda tokens: _packed_states(model, tokens, lengths))
        if seen is not None:
            raise ConfigError(
                f"a {type(model).__name__} lets packed examples see each other: other tokens in its neighbours changed "
                f"the hidden states of an example by {seen:.1g} of their norm; {WITHOUT_PACKING}"
            )
        differs = float(changes(packed, alone).median())
        if differs > ALONE_TOLERANCE:
            raise ConfigError(
                f"a {type(model).__name__} computes packed examples other than alone: the hidden states of an example "
                f"differ by {differs:.1g} of their norm, although its neighbours do not change them, so the model does "
                f"not follow position_ids; {WITHOUT_PACKING}"
            )
