"""Generates with one side of a comparison, in a process of its own: a batch for each line of input.

    python profiling/parts/generation_worker.py '{"side": "ours", "model": "..."}'     # by hand: Enter generates

generation.py starts it. It prints a JSON line after set-up and after each batch. The batch sizes take turns; the last
line of each is of a short traced answer.

ours: `load_quantized`, `add_lora_` if asked, and `decode_copies`, which makes copies for 4 bits.
peer: transformers with `BitsAndBytesConfig` as its documentation recommends, and peft's adapters if asked.
plain: transformers in bf16.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path, it finds the other parts

import torch
from transformers.utils import logging

from parts.peft_steps import load_base
from parts.step_worker import ALPHA, RANK, TOKEN_IDS, say, settled_bytes, wait_for_line
from qlora_lite.compute.host_memory import set_host_limits
from qlora_lite.memory.counters import resident_bytes
from qlora_lite.memory.trace import StorageTrace

TRACED_TOKENS = 4


@dataclass(frozen=True)
class GenerationWork:
    """The work of one worker: the side, the checkpoint, the format of the base, adapters, and the batches.

    prompt, new_tokens: of a row. turns: how often each batch is generated; the first time warms up.
    """

    side: str
    model: str
    format: str = "nf4"
    lora: bool = False
    batches: tuple[int, ...] = (1, 8, 32)
    prompt: int = 128
    new_tokens: int = 48
    turns: int = 3

    @property
    def steps(self) -> int:
        return self.turns * len(self.batches)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Clock:
    """A logits processor that notes when the logits of each token are there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores


def ours(work: GenerationWork) -> Any:
    from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized

    model = load_quantized(work.model, QuantConfig(format=work.format))
    if work.lora:
        add_lora_(model, LoraConfig(rank=RANK, alpha=ALPHA))
    return model


def peer(work: GenerationWork) -> Any:
    model = load_base(Path(work.model), "none" if work.side == "plain" else work.format)
    if not work.lora:
        return model
    import peft

    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, lora)


def generate(model: Any, tokens: torch.Tensor, count: int) -> list[float]:
    """Generates `count` tokens greedily for each row. Returns the times of the call and of the logits of each token."""
    clock = Clock()
    began = time.perf_counter()
    model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        logits_processor=[clock],
    )
    return [began, *clock.times]


def timed(model: Any, work: GenerationWork, tokens: torch.Tensor, resident: int) -> None:
    """Generates, and prints the seconds of the prompt and of all tokens after the first, and the resident peak."""
    settled_bytes()  # so that holes that another batch size left do not count
    began, first, *_, last = generate(model, tokens, work.new_tokens)
    peak = (resident_bytes("VmHWM") or 0) - resident
    say(batch=len(tokens), prompt_seconds=first - began, seconds=last - first, peak=peak)


def traced(model: Any, tokens: torch.Tensor) -> None:
    """Generates a few tokens, and prints the most live bytes above those of the model."""
    with StorageTrace() as trace:
        generate(model, tokens, TRACED_TOKENS)
    say(batch=len(tokens), live_peak=trace.peak()[0] - trace.live_bytes())


def main() -> None:
    set_host_limits()
    torch.set_num_threads(2)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    given = json.loads(sys.argv[1])
    work = GenerationWork(**given | {"batches": tuple(given["batches"])})
    model = (ours if work.side == "ours" else peer)(work).eval()
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(TOKEN_IDS, (batch, work.prompt), generator=generator) for batch in work.batches]
    resident, copied = settled_bytes(), 0
    with ExitStack() as stack:
        if work.side == "ours":
            from qlora_lite.generation import decode_copies

            copied = stack.enter_context(decode_copies(model))
        say(ready=True, resident=resident, copied=copied)
        for turn in range(work.steps):
            wait_for_line()
            timed(model, work, rows[turn % len(rows)], resident)
        for tokens in rows:
            wait_for_line()
            traced(model, tokens)


if __name__ == "__main__":
    main()
