"""Hides tokens of texts for a masked language model, other ones in each epoch (Devlin et al., BERT, 2018, section 3.1).

Of the tokens that are not special ones 15 % are learned. Of these, 80 % are replaced by the mask token and 10 % by any
token, and 10 % stay. Seed, epoch and place of the batch decide on them, so that a run can be resumed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.errors import ConfigError

LEARNED, REPLACED, RANDOM = 0.15, 0.8, 0.1


@dataclass(frozen=True)
class Masking:
    """What is needed of a tokenizer. special: tokens that are never hidden. vocabulary: the number of tokens."""

    mask_token_id: int
    special: frozenset[int]
    vocabulary: int

    @classmethod
    def of(cls, tokenizer: Any) -> Masking:
        """Returns the masking of a tokenizer. Raises ConfigError for one without a mask token."""
        if getattr(tokenizer, "mask_token_id", None) is None:
            raise ConfigError("this tokenizer has no mask token, which a masked language model needs")
        return cls(int(tokenizer.mask_token_id), frozenset(tokenizer.all_special_ids), len(tokenizer))

    def hidden(self, tokens: Sequence[int], draws: random.Random) -> tuple[list[int], list[int]]:
        """Returns the tokens, some of them replaced, and the labels: the tokens that are learned."""
        given, labels = list(tokens), [IGNORE_INDEX] * len(tokens)
        for place, token in enumerate(tokens):
            if token in self.special or draws.random() >= LEARNED:
                continue
            labels[place], draw = token, draws.random()
            if draw < REPLACED:
                given[place] = self.mask_token_id
            elif draw < REPLACED + RANDOM:
                given[place] = draws.randrange(self.vocabulary)
        return given, labels
