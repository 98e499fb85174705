"""Runs trainings of learn_like_trl.py, which starts this with a JSON list of them. Prints a line of losses for each.

    python profiling/parts/trl_learning_worker.py '[{"side": "ours", "trainer": "sft", "model": "...", "steps": 30}]'

The sides are those of trl_worker.py: the same script with three lines changed. Both start from the same A, which
depends on the name of its layer alone, and both hold A and B in the same dtype. Left alone they would not: trl rounds
the adapters of a model that bitsandbytes has quantized to bf16, and AdamW's updates are rounded to bf16 then.
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path, it finds the other parts

import torch
import trl
from datasets import Dataset
from transformers import AutoTokenizer
from transformers.utils import logging

import parts.example_models  # noqa: F401  # the examples can be imported then
from message_records import generate, prompt_messages
from parts.step_worker import say
from parts.trl_worker import TrainerWork, ours, peer, settings
from qlora_lite.integrations import trl as packed_trl

BF16_HALF_STEP = 2.0**-9


def records(work: TrainerWork) -> list[dict[str, Any]]:
    """Returns messages with their records; for dpo with the record of another message too."""
    examples = generate("train", work.steps * work.rows, seed=0)
    found = []
    for other, example in zip([examples[-1], *examples], examples, strict=False):
        row = {"prompt": prompt_messages(example), "completion": example["messages"][-1:]}
        if work.trainer == "dpo":
            row = {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["messages"][-1:]}
        found.append(row)
    return found


@torch.no_grad()
def start_(model: Any, moved: int) -> None:
    """Gives A the values of kaiming_uniform_, as peft does, the same on both sides.

    moved: 0, or the seed by which each value moves by 2^-9 of itself, up or down: a change as small as rounding.
    """
    for name, parameter in model.named_parameters():
        if ".lora_A." not in name:
            continue
        seed = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = torch.empty(parameter.shape)
        torch.nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=seed)
        if moved:
            seed.manual_seed(seed.initial_seed() + moved)
            values *= 1 + BF16_HALF_STEP * torch.randn(values.shape, generator=seed).sign()
        parameter.copy_(values)


def train(work: TrainerWork, dtype: torch.dtype, moved: int) -> list[float]:
    """Returns the losses of all steps, with A and B of this dtype."""
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    model, config = {"ours": ours, "peer": peer}[work.side](work)
    name = work.trainer.upper()
    trainer = getattr(packed_trl if work.side == "ours" else trl, f"{name}Trainer")(
        model,
        args=getattr(trl, f"{name}Config")(**settings(work) | {"max_steps": work.steps}),
        train_dataset=Dataset.from_list(records(work)),
        processing_class=tokenizer,
        peft_config=config,
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    start_(trainer.model, moved)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    torch.set_num_threads(2)
    logging.set_verbosity_error()
    for given in json.loads(sys.argv[1]):
        dtype, moved = getattr(torch, given.pop("dtype", "bfloat16")), given.pop("moved", 0)
        torch.manual_seed(0)
        say(losses=train(TrainerWork(**given), dtype, moved))


if __name__ == "__main__":
    main()
