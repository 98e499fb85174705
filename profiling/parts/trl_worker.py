"""Takes the training steps of a trainer of trl or transformers, in a process of its own: a step for each line of input.

    python profiling/parts/trl_worker.py '{"side": "ours", "trainer": "sft", "model": "..."}'     # by hand

`step_processes.py` starts it for versus_trl.py. It prints a JSON line after set-up, after each step and at the end.

peer: trl + transformers + peft + bitsandbytes as their documentation recommends: `BitsAndBytesConfig` (NF4 with double
quantization, computing in bf16), `peft_config`, and the trainer's defaults.
ours: the same script with three lines changed: `load_quantized` and its import, and trl's trainer from
`qlora_lite.integrations.trl`. The trainer `trainer` is transformers' own, with peft there and `add_lora_` here.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path, it finds the other parts

import torch
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import logging

from parts.peft_steps import load_base
from parts.step_worker import (
    ALPHA,
    LEARNING_RATE,
    RANK,
    TOKEN_IDS,
    optimizer_states,
    say,
    settled_bytes,
    wait_for_line,
)
from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.counters import resident_bytes
from qlora_lite.memory.trace import StorageTrace
from qlora_lite.offload.mapped_file import mapped_spans

NEW_TOKENS = 32
GENERATIONS = 4


@dataclass(frozen=True)
class TrainerWork:
    """The work of one worker: the side, the trainer (sft, dpo, grpo, trainer), the checkpoint, and the batch.

    rows: of a batch; pairs for dpo, completions for grpo. tokens: of a row. embedding_format, base: of our side.
    """

    side: str
    trainer: str
    model: str
    checkpointing: bool = True
    rows: int = 2
    tokens: int = 512
    steps: int = 5
    embedding_format: str = "none"
    base: str = "memory"

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Watch(TrainerCallback):  # type: ignore[misc]
    """Times each step of a trainer, which is started by a line of input, and traces the storages of the last one."""

    def __init__(self, steps: int) -> None:
        self.steps, self.resident, self.began = steps, 0, 0.0
        self.trace: StorageTrace | None = None
        self.on_disk = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.resident = settled_bytes()
        say(ready=True, resident=self.resident)

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        wait_for_line()
        if state.global_step == self.steps:
            self.trace = StorageTrace()
            self.trace.__enter__()
            # Kernels that torch does not see read packed weights, so the trace is told of them.
            tensors = {id(tensor): tensor for tensor in (*given["model"].parameters(), *given["model"].buffers())}
            for tensor in tensors.values():
                self.trace.label(tensor, Category.BASE_WEIGHT)
            self.on_disk = sum(tensor.nbytes for tensor, _, _ in mapped_spans(tensors.values()))
            for value in optimizer_states():
                self.trace.label(value, Category.OPTIMIZER_STATE)
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.trace is None:
            peak = (resident_bytes("VmHWM") or 0) - self.resident
            say(seconds=time.perf_counter() - self.began, peak=peak)
            return
        self.trace.__exit__(None, None, None)
        resident = self.trace.live_bytes() - sum(value.nbytes for value in optimizer_states())
        say(live_peak=self.trace.peak()[0] - resident, live_resident=resident - self.on_disk)


def settings(work: TrainerWork) -> dict[str, Any]:
    """The arguments that both sides give to the trainer."""
    shared: dict[str, Any] = {
        "output_dir": "unused",
        "max_steps": work.steps + 1,
        "per_device_train_batch_size": work.rows,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": work.checkpointing,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 0,
    }
    if work.trainer in ("sft", "dpo"):
        shared["max_length"] = work.tokens
    if work.trainer == "grpo":
        shared |= {"num_generations": GENERATIONS, "max_completion_length": NEW_TOKENS, "temperature": 1.0}
    return shared


def rows(work: TrainerWork, tokenizer: Any) -> list[dict[str, Any]]:
    """The records of both sides: random tokens, or texts of them where the trainer tokenizes itself."""
    ids = torch.randint(TOKEN_IDS, (64, 2, work.tokens), generator=torch.Generator().manual_seed(0))
    if work.trainer in ("sft", "trainer"):
        return [{"input_ids": row[0].tolist(), "labels": row[0].tolist()} for row in ids]
    texts = [[tokenizer.decode(part) for part in row] for row in ids]
    if work.trainer == "dpo":
        prompts = [tokenizer.decode(row[0, : work.tokens // 4]) for row in ids]
        return [
            {"prompt": prompt, "chosen": one[: 2 * work.tokens], "rejected": other[: 2 * work.tokens]}
            for prompt, (one, other) in zip(prompts, texts, strict=True)
        ]
    return [{"prompt": one[: work.tokens]} for one, _ in texts]


def length_reward(completions: list[str], **given: object) -> list[float]:
    """A reward that differs within a group."""
    return [float(len(set(text))) for text in completions]


def ours(work: TrainerWork) -> tuple[Any, Any]:
    from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized
    from qlora_lite.training.forward import fuse_

    config = QuantConfig(double_quant=True, embedding_format=work.embedding_format)
    model = load_quantized(work.model, config, base=work.base)
    if work.trainer != "trainer":
        return model, adapters()
    fuse_(model, "full" if work.checkpointing else "none")
    add_lora_(model, LoraConfig(rank=RANK, alpha=ALPHA))
    return model, None


def adapters() -> Any:
    """The adapters of both sides."""
    import peft

    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")


def peer(work: TrainerWork) -> tuple[Any, Any]:
    import peft

    model = load_base(Path(work.model), "nf4")
    if work.trainer == "trainer":
        prepared = peft.prepare_model_for_kbit_training(model, work.checkpointing, {"use_reentrant": False})
        return peft.get_peft_model(prepared, adapters()), None
    return model, adapters()


def make_trainer(work: TrainerWork) -> Any:
    """Returns the trainer, ready to train."""
    import transformers
    import trl
    from datasets import Dataset

    from qlora_lite.integrations import AdapterTrainer
    from qlora_lite.integrations import trl as packed_trl

    tokenizer = AutoTokenizer.from_pretrained(work.model)
    model, config = {"ours": ours, "peer": peer}[work.side](work)
    data = Dataset.from_list(rows(work, tokenizer))
    if work.trainer == "trainer":
        kind = AdapterTrainer if work.side == "ours" else transformers.Trainer
        return kind(model, transformers.TrainingArguments(**settings(work)), train_dataset=data)
    name = work.trainer.upper()
    trainer = getattr(packed_trl if work.side == "ours" else trl, f"{name}Trainer")
    args = getattr(trl, f"{name}Config")(**settings(work))
    options: dict[str, Any] = {"reward_funcs": length_reward} if work.trainer == "grpo" else {}
    if work.trainer == "grpo" and work.side == "ours":
        options["decode_copies"] = True
    return trainer(model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=config, **options)


def main() -> None:
    torch.set_num_threads(2)
    logging.set_verbosity_error()
    work = TrainerWork(**json.loads(sys.argv[1]))
    torch.manual_seed(0)
    trainer = make_trainer(work)
    trainer.remove_callback(PrinterCallback)  # it prints lines that look like figures
    trainer.add_callback(Watch(work.steps))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    say(first_loss=losses[0])


if __name__ == "__main__":
    main()
