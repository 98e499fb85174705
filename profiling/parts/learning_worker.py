"""Runs the works of learn_like_peft.py, which starts this with a JSON list of them. Prints a JSON line for each.

prepare: writes the tokens, one adapter that all plain LoRA trainings start from, and a random model of two small layers
if there is no model.
ours: `load_quantized`, `add_lora_` or `load_adapter_`, and `train`, as a user calls them.
peer: transformers + peft + bitsandbytes, with the same adapter, batches, schedule, clipping and AdamW.
judge_ours, judge_peer: held-out perplexity of saved adapters on a freshly loaded base.

The peer is judged in a process that never trained: on a CPU with AVX512-BF16, its first forward pass in eval mode
changes the packed weights in place, and later gradients are wrong.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path, it finds the other parts

import torch
from safetensors.torch import load_file, save_file

from parts.example_models import make_tiny_model
from parts.peft_steps import load_base
from parts.perplexity import perplexity
from parts.step_worker import ALPHA, RANK, peer_step, say, settled_bytes
from qlora_lite import LoraConfig, QuantConfig, TrainConfig, add_lora_, load_adapter_, load_quantized, save_adapter
from qlora_lite import train as train_ours
from qlora_lite.checkpoints.hub import load_tokenizer
from qlora_lite.lora.adapters import adapter_parameters, adapters_disabled
from qlora_lite.memory.counters import resident_bytes
from qlora_lite.training.optim import learning_rate_factor

SEED = 0
HELD_OUT = 10  # every tenth topic, by length
START, TOKENS = "start", "tokens.safetensors"
BF16_HALF_STEP = 2.0**-9
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Work:
    """The work of one worker: its kind, the checkpoint, the folder of its files, and its settings.

    taken: steps to take, None for the whole schedule. fp32: products and activations in fp32 over the same packed base.
    moved: A starts half a step of bf16 away, up or down, a change as small as rounding. settings: fields of LoraConfig
    that differ from plain LoRA. adapters: names of the adapters to be judged.
    """

    name: str
    kind: str
    model: str
    folder: str
    steps: int
    rows: int
    tokens: int
    held_out: int
    learning_rate: float = 2e-4
    lora_plus_ratio: float = 1.0
    format: str = "nf4"
    taken: int | None = None
    fp32: bool = False
    moved: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()

    def path(self, name: str) -> Path:
        return Path(self.folder) / name


def training(work: Work) -> TrainConfig:
    return TrainConfig(
        steps=work.steps,
        learning_rate=work.learning_rate,
        warmup_steps=work.steps // 10,
        lora_plus_ratio=work.lora_plus_ratio,
        checkpointing="none",
        seed=SEED,
    )


def windows_of(work: Work, part: str) -> torch.Tensor:
    return load_file(work.path(TOKENS))[part]


def batches(work: Work, seconds: list[float]) -> Iterator[Batch]:
    """Yields the same batches in the same order for every work, and appends the seconds of each step."""
    windows = windows_of(work, "train")
    for step in range(work.steps if work.taken is None else work.taken):
        places = [(step * work.rows + row) % len(windows) for row in range(work.rows)]
        began = time.perf_counter()
        yield {"input_ids": windows[places], "labels": windows[places].clone()}
        seconds.append(time.perf_counter() - began)


def _paragraphs(names: Iterable[str]) -> list[str]:
    return [paragraph for name in names for paragraph in topics[name].split("\n\n")]


def split_texts() -> tuple[str, str]:
    """Splits Python's help texts into training and held-out topics; no held-out paragraph is trained on."""
    names = sorted(topics, key=lambda name: len(topics[name]))
    held_out = _paragraphs(names[HELD_OUT // 2 :: HELD_OUT])
    seen = {" ".join(paragraph.split()) for paragraph in held_out}
    rest = _paragraphs(name for place, name in enumerate(names) if place % HELD_OUT != HELD_OUT // 2)
    return "\n\n".join(p for p in rest if " ".join(p.split()) not in seen), "\n\n".join(held_out)


def prepare(work: Work) -> dict[str, Any]:
    if not Path(work.model).exists():
        make_tiny_model(Path(work.model))
    tokenizer, parts = load_tokenizer(work.model), {}
    for part, text in zip(("train", "held_out"), split_texts(), strict=True):
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
        windows = ids[: len(ids) // work.tokens * work.tokens].view(-1, work.tokens)
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(SEED))
        parts[part] = windows[order] if part == "train" else windows[: work.held_out].clone()
    save_file(parts, work.path(TOKENS))
    model = load_quantized(work.model, QuantConfig())
    torch.manual_seed(SEED)
    add_lora_(model, LoraConfig(rank=RANK, alpha=ALPHA))
    save_adapter(model, work.path(START))
    with adapters_disabled(model):
        return {"perplexity": perplexity(model, parts["held_out"])}


def _figures(losses: list[float], seconds: list[float], resident: int) -> dict[str, Any]:
    peak = (resident_bytes("VmHWM") or 0) - resident
    return {"losses": losses, "step_seconds": statistics.median(seconds), "peak": peak}


@torch.no_grad()
def move_start_(model: Any) -> None:
    """Multiplies the values of A by 1 +- 2^-9, which puts each halfway between two neighbours in bf16."""
    torch.manual_seed(SEED + 1)
    for name, parameter in adapter_parameters(model).items():
        if name.endswith("lora_A"):
            parameter.mul_(1 + BF16_HALF_STEP * torch.randn_like(parameter).sign())


def ours(work: Work) -> dict[str, Any]:
    model = load_quantized(work.model, QuantConfig(format=work.format))
    if work.settings:
        torch.manual_seed(SEED)
        add_lora_(model, LoraConfig(**{"rank": RANK, "alpha": ALPHA, **work.settings}))
    else:
        load_adapter_(model, work.path(START))
    if work.fp32:
        model.float()
    if work.moved:
        move_start_(model)
    held_out = windows_of(work, "held_out")
    before = perplexity(model, held_out)
    seconds: list[float] = []
    resident = settled_bytes()
    losses = train_ours(model, batches(work, seconds), training(work), progress=False).losses
    figures = _figures(losses, seconds, resident)
    if not work.settings:
        save_adapter(model, work.path(work.name))
    return {**figures, "before": before, "perplexity": perplexity(model, held_out)}


def peer(work: Work) -> dict[str, Any]:
    import peft

    model = load_base(Path(work.model), work.format, torch.float32 if work.fp32 else torch.bfloat16)
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.config.use_cache = False
    model = peft.PeftModel.from_pretrained(model, work.path(START), is_trainable=True).train()
    config = training(work)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=config.learning_rate, weight_decay=config.weight_decay
    )
    losses, seconds = [], list[float]()
    resident = settled_bytes()
    for step, batch in enumerate(batches(work, seconds)):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(step, config)
        losses.append(peer_step(model, optimizer, batch))
    model.save_pretrained(work.path(work.name))
    return _figures(losses, seconds, resident)


def judge_ours(work: Work) -> dict[str, Any]:
    model, found = load_quantized(work.model, QuantConfig(format=work.format)), {}
    for name in work.adapters:
        load_adapter_(model, work.path(name))
        found[name] = perplexity(model, windows_of(work, "held_out"))
    return found


@torch.no_grad()
def judge_peer(work: Work) -> dict[str, Any]:
    import peft

    base, found = load_base(Path(work.model), work.format), {}
    windows = windows_of(work, "held_out")
    model: Any = None
    for name in work.adapters:
        if model is None:
            model = peft.PeftModel.from_pretrained(base, work.path(name), adapter_name=name).eval()
        else:
            model.load_adapter(work.path(name), name)
            model.set_adapter(name)
        losses = [float(model(input_ids=row, labels=row, use_cache=False).loss) for row in windows.split(1)]
        found[name] = math.exp(statistics.mean(losses))
    return found


KINDS = {"prepare": prepare, "ours": ours, "peer": peer, "judge_ours": judge_ours, "judge_peer": judge_peer}


def main() -> None:
    for given in json.loads(sys.argv[1]):
        work = Work(**given)
        say(name=work.name, **KINDS[work.kind](work))


if __name__ == "__main__":
    main()
