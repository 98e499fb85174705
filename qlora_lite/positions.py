"""How many positions a transformers model has: what its config says, and what its tables hold."""

from __future__ import annotations

import re

from torch import Tensor, nn

from qlora_lite.architecture import config_value, text_config

# A model's number of positions, as configs name it. The first one that a config has counts.
LENGTH_NAMES = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_target_positions"),
    *("n_ctx", "seq_length"),
)
# Embeddings and tensors that have a row for each position, and the most rows that they have beyond that.
MOST_UNUSED = 4
OTHER_INPUTS = re.compile(r"vision|visual|image|audio|speech")
POSITION_TABLE = re.compile(r"(^|_)(wpe|pos|positions?)(_|$)")


def longest_sequence(config: object) -> int | None:
    """Returns the number of positions that a model was made for, None if its config does not give it."""
    for part in (config, text_config(config)):
        for name in LENGTH_NAMES:
            if isinstance(length := config_value(part, name), int) and length > 0:
                return length
    return None


def most_positions(model: nn.Module) -> int | None:
    """Returns the number of positions that a model has a table for, so that no row can have more tokens.

    None for models without such a table: with rotary, relative or recurrent positions they run on longer rows than
    they were made for.
    """
    config = getattr(model, "config", None)
    made_for = longest_sequence(config)
    if made_for is None:
        return None
    if _has_table_of_slopes(config):
        return made_for
    modules = ((name, module) for name, module in model.named_modules() if not OTHER_INPUTS.search(name))
    tables = [table for name, module in modules if (table := _position_table(name, module)) is not None]
    return next((rows - unused for rows, unused in tables if made_for <= rows <= made_for + MOST_UNUSED), None)


def _has_table_of_slopes(config: object) -> bool:
    """Whether this is an MPT, which computes ALiBi's slopes for `max_seq_len` positions."""
    attention = getattr(config, "attn_config", None)
    return hasattr(config, "max_seq_len") and bool(getattr(attention, "alibi", False))


def _position_table(name: str, module: nn.Module) -> tuple[int, int] | None:
    """Returns the rows of a module's table of positions, and how many of them stand for no position; None without."""
    if isinstance(module, nn.Embedding):
        if not POSITION_TABLE.search(name.removesuffix(".base_layer").rpartition(".")[2]):
            return None
        # BART adds an offset to positions, and RoBERTa counts them from padding_idx + 1.
        unused = int(getattr(module, "offset", 0)) + (0 if module.padding_idx is None else module.padding_idx + 1)
        return module.num_embeddings, unused
    for attribute, value in (module._buffers | module.__dict__).items():
        if isinstance(value, Tensor) and value.dim() == 2 and POSITION_TABLE.search(attribute):
            return len(value), 0
    return None
