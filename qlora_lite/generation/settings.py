"""How a model answers: the length of an answer, and how its tokens are drawn.

transformers takes what a call leaves open from the model's own generation config, and fills the rest with defaults of
its own. Here one complete config is made for a call, so that nothing is set twice and nothing is set elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_lite.checks import is_count, is_finite, require
from qlora_lite.errors import ConfigError

DEFAULT_NEW_TOKENS = 512
MOST_SEEDS = 2**63
# What has an effect on drawn tokens only.
OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
# What would make a call return something else than one row of tokens for each prompt, or ask for another way to decode.
PLAIN = {
    **dict.fromkeys(("num_beams", "num_return_sequences"), 1),
    **dict.fromkeys(("return_dict_in_generate", "output_scores", "output_logits", "output_attentions"), False),
    **dict.fromkeys(("output_hidden_states",), False),
    **dict.fromkeys(("num_beam_groups", "penalty_alpha", "dola_layers", "prompt_lookup_num_tokens"), None),
    **dict.fromkeys(("max_length", "max_time", "stop_strings", "cache_implementation"), None),
    "use_cache": True,
}


@dataclass(frozen=True)
class GenerationSettings:
    """How a model answers.

    max_new_tokens: tokens of an answer at most. temperature: 0 takes the likeliest token each time; above 0, tokens are
    drawn. top_p, top_k: draw among the likeliest tokens only, of this share of the probability or of this number. None
    leaves each to the generation config of the model; without one there, the likeliest token is taken.
    seed: of the drawn numbers. None draws a new one.
    """

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        count = self.max_new_tokens
        require(is_count(count, 1), "max_new_tokens must be at least 1", count)
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            require(value is None or is_finite(value), f"{name} must be a finite number", value)
        require(self.temperature is None or self.temperature >= 0, "temperature must be at least 0", self.temperature)
        require(self.top_p is None or 0 < self.top_p <= 1, "top_p must be above 0 and at most 1", self.top_p)
        require(self.top_k is None or is_count(self.top_k, 1), "top_k must be at least 1", self.top_k)
        require(self.seed is None or is_count(self.seed, 0), "seed must be a whole number from 0 on", self.seed)
        if self.temperature == 0 and (given := self._of_drawing()):
            raise ConfigError(f"{', '.join(given)} and temperature 0, which draws nothing, exclude each other")

    def _of_drawing(self) -> list[str]:
        return [name for name in ("top_p", "top_k", "seed") if getattr(self, name) is not None]


def draws(found: Any, settings: GenerationSettings) -> bool:
    """Whether tokens are drawn. found: the generation config of the model, None without one.

    Raises ConfigError for a seed without effect.
    """
    by_model = bool(getattr(found, "do_sample", False)) and getattr(found, "temperature", None) != 0
    if settings.temperature is not None:
        is_drawn = settings.temperature > 0
    else:
        is_drawn = by_model or settings.top_p is not None or settings.top_k is not None
    if settings.seed is not None and not is_drawn:
        raise ConfigError(
            f"seed {settings.seed} has no effect, since this model takes the likeliest token; set a temperature too, "
            f"or leave out the seed"
        )
    return is_drawn


def complete_config(model: Any, settings: GenerationSettings, stop: Sequence[int], pad: int) -> Any:
    """Returns transformers' generation config for a call: that of the model with these settings.

    stop: tokens that end an answer. pad: the token that fills rows.
    """
    made = copy.deepcopy(model.generation_config)
    is_drawn = draws(made, settings)
    values: dict[str, Any] = {name: value for name, value in PLAIN.items() if hasattr(made, name)}
    values |= {"max_new_tokens": settings.max_new_tokens, "do_sample": is_drawn}
    values |= {"eos_token_id": list(stop) or None, "pad_token_id": pad}
    if is_drawn:
        chosen = {name: getattr(settings, name) for name in ("temperature", "top_p", "top_k")}
        values |= {name: value for name, value in chosen.items() if value is not None}
        if settings.top_k is None and made.top_k is None:
            values["top_k"] = 0  # transformers would set 50
    else:
        values |= dict.fromkeys(name for name in OF_SAMPLING if hasattr(made, name))
    for name, value in values.items():
        setattr(made, name, value)
    return made
