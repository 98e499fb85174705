"""A training step makes no more events of torch's profiler than allowed.

An event is an entry that `torch.profiler` records for CPU activity: an operator, those that it calls, a node of
autograd. Their number does not depend on the machine's speed, and each costs a microsecond or more.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_lite import LoraConfig, QuantConfig, TrainConfig, add_lora_, quantize_base_, train
from qlora_lite.data.batching import Batch

# Of SmolLM2-135M in NF4, rank 16 on all linear layers, 2 x 512 tokens, every block recomputed.
LAYERS, ALLOWED = 30, 60_000


def events_of_a_step(layers: int) -> int:
    """Returns the events of the second step of a model with SmolLM2-135M's widths and this number of layers."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    quantize_base_(model, QuantConfig(format="nf4", double_quant=True))
    add_lora_(model, LoraConfig(rank=16, target_modules="all-linear"))
    ids = torch.randint(100, (2, 512))
    found: list[int] = []

    def batches() -> Iterator[Batch]:
        batch = {"input_ids": ids, "labels": ids}
        yield batch
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            yield batch
        found.append(len(profiler.events() or ()))

    stream = batches()
    train(model, stream, TrainConfig(steps=2, checkpointing="full"), progress=False)
    next(stream, None)  # train does not ask for another batch
    return found[0]


def test_a_step_of_smollm2_stays_within_the_allowed_events() -> None:
    """Events grow linearly with the layers, so two small models stand for the whole one."""
    two, three = events_of_a_step(2), events_of_a_step(3)
    assert two + (LAYERS - 2) * (three - two) <= ALLOWED, (two, three)
