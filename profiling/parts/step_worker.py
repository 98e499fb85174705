"""Takes the training steps of one side of a comparison, in a process of its own: a step for each line of input.

    python profiling/parts/step_worker.py '{"side": "ours", "model": "..."}'     # by hand: Enter takes a step

`step_processes.py` starts it for the scripts. It prints a JSON line after set-up, after each step and at the end.

ours: `load_quantized`, `add_lora_` and `train`, as a user calls them.
peer: transformers + peft + bitsandbytes as their documentation recommends: `BitsAndBytesConfig` (NF4 with double
quantization, or 8 bits, computing in bf16), `prepare_model_for_kbit_training`, non-reentrant checkpointing and torch's
AdamW.
floor: the matrix products and attention calls of such a step, and nothing else.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path, it finds the other parts

import torch

from qlora_lite.compute.host_memory import release_freed_pages, set_host_limits
from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.counters import reset_resident_peak, resident_bytes
from qlora_lite.memory.trace import StorageTrace

RANK, ALPHA = 16, 32
LEARNING_RATE = 2e-4
TOKEN_IDS = 100  # ids that every tokenizer has


@dataclass(frozen=True)
class Work:
    """The work of one worker: the side, the checkpoint, the format of the base, and the batch.

    lengths: the number of different lengths, from a quarter of `tokens` to `tokens`. Each batch draws one of them; with
    1, every batch has `tokens` tokens.
    """

    side: str
    model: str
    format: str = "nf4"
    checkpointing: str | int = "full"
    embedding_format: str = "none"
    int8_activations: bool = False
    dropout: float = 0.0
    rows: int = 2
    tokens: int = 512
    steps: int = 6
    lengths: int = 1
    threads: int = 2

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def say(**figures: Any) -> None:
    print(json.dumps(figures), flush=True)


def wait_for_line() -> str:
    return sys.stdin.readline().strip()


def optimizer_states() -> list[torch.Tensor]:
    """Returns the states of every optimizer in the process, once where a wrapper shares them."""
    optimizers = [thing for thing in gc.get_objects() if isinstance(thing, torch.optim.Optimizer)]
    states = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    return list({id(value): value for value in states if isinstance(value, torch.Tensor)}.values())


def settled_bytes() -> int:
    """Frees unused memory, resets the peak of the process (VmHWM), and returns its resident bytes."""
    gc.collect()
    release_freed_pages()
    resident = resident_bytes() or 0
    reset_resident_peak()
    return resident


class Watch:
    """Times each step, which is started by a line of input, and traces the storages of the last one."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.start_resident = 0

    def set_up_done(self) -> None:
        """Marks the state above which memory is counted."""
        self.start_resident = settled_bytes()
        say(ready=True, resident=self.start_resident)

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yields a batch for each line of input, and prints a line of figures after its step."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(TOKEN_IDS, (self.work.rows, self.work.tokens), generator=generator)
        batch = {"input_ids": ids, "labels": ids.clone()}
        for _ in range(self.work.steps):
            wait_for_line()
            number = int(torch.randint(self.work.lengths, (), generator=generator)) + 1
            shortest = self.work.tokens // 4
            length = shortest + (self.work.tokens - shortest) * number // self.work.lengths
            began = time.perf_counter()
            yield {name: rows[:, :length].contiguous() for name, rows in batch.items()}
            say(seconds=time.perf_counter() - began, peak=(resident_bytes("VmHWM") or 0) - self.start_resident)
        wait_for_line()
        trace = StorageTrace()
        with trace:
            # The optimizer is made after set-up, so its states count, as in the resident memory of the process.
            for state in optimizer_states():
                trace.label(state, Category.OPTIMIZER_STATE)
            yield batch
        resident = trace.live_bytes() - sum(state.nbytes for state in optimizer_states())
        say(live_peak=trace.peak()[0] - resident, live_resident=resident)


def ours(work: Work, watch: Watch) -> list[float]:
    from qlora_lite import LoraConfig, QuantConfig, TrainConfig, add_lora_, load_quantized, train

    quant = QuantConfig(
        format=work.format, embedding_format=work.embedding_format, int8_activations=work.int8_activations
    )
    model = load_quantized(work.model, quant)
    add_lora_(model, LoraConfig(rank=RANK, alpha=ALPHA, dropout=work.dropout))
    watch.set_up_done()
    config = TrainConfig(steps=work.steps + 1, learning_rate=LEARNING_RATE, checkpointing=work.checkpointing)
    stream = watch.batches()
    losses = train(model, stream, config, progress=False).losses
    next(stream, None)  # train does not ask for another batch, so the figures of the last one are printed here
    return losses


def peer_step(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> float:
    """Takes a training step as a user of transformers and peft writes it, and returns the loss."""
    loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def peer(work: Work, watch: Watch) -> list[float]:
    import peft

    from parts.peft_steps import load_base

    model = load_base(Path(work.model), work.format)
    checkpointing = work.checkpointing == "full"
    options = {"use_reentrant": False} if checkpointing else None
    model = peft.prepare_model_for_kbit_training(model, checkpointing, options)
    model.config.use_cache = False
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=work.dropout)
    model = peft.get_peft_model(model, lora)
    model.train()
    watch.set_up_done()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    return [peer_step(model, optimizer, batch) for batch in watch.batches()]


def floor(work: Work, watch: Watch) -> list[None]:
    from parts.machine_floor import Floor

    machine = Floor(work.model, work.rows, work.tokens, RANK)
    set_host_limits()
    watch.set_up_done()
    for _ in watch.batches():
        machine.step()
    return [None]


SIDES = {"ours": ours, "peer": peer, "floor": floor}


def main() -> None:
    work = Work(**json.loads(sys.argv[1]))
    torch.set_num_threads(work.threads)
    torch.manual_seed(0)
    losses = SIDES[work.side](work, Watch(work))
    say(first_loss=losses[0])


if __name__ == "__main__":
    main()
