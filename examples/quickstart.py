"""Runs the whole path on a real model: quantize, train, profile, merge, export, and check the export.

    python examples/quickstart.py            # SmolLM2-135M-Instruct, a few minutes on two cores
    python examples/quickstart.py --tiny     # a random model of two small layers, seconds

The model learns to turn a short message into a JSON record (message_records.py). The script prints the exact match on
held-out messages before and after training, the memory of a training step, and the share of held-out answers that are
equal when plain transformers reads the exported fp16 folder in a fresh process. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from message_records import exact_match, generate, prompt_messages
from qlora_lite import (
    LoraConfig,
    MemoryProfiler,
    QuantConfig,
    TrainConfig,
    add_lora_,
    export_merged,
    load_quantized,
    save_adapter,
    train,
)
from qlora_lite.checkpoints import load_tokenizer
from qlora_lite.data import batches, tokenize_all
from qlora_lite.generation import decode_copies
from qlora_lite.memory import readable_bytes, render
from real_model import fetch_model

ANSWER_TOKENS = 40
PROMPTS_AT_ONCE = 64
TRACED_STEPS = 3  # the first has no states of the optimizer yet


@dataclass(frozen=True)
class Size:
    """The sizes of training and evaluation."""

    training: int
    heldout: int
    batch: int
    steps: int
    rank: int = 16
    learning_rate: float = 4e-4
    lora_plus_ratio: float = 4.0  # the rate of B over that of A


FULL = Size(training=560, heldout=64, batch=8, steps=70)
TINY = Size(training=16, heldout=4, batch=2, steps=3)


@torch.no_grad()
def answers(model: Any, tokenizer: Any, conversations: list[list[dict[str, str]]]) -> list[str]:
    """Returns the greedy answer of the model to each conversation."""
    tokenizer.padding_side = "left"
    texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in conversations]
    said: list[str] = []
    for start in range(0, len(texts), PROMPTS_AT_ONCE):
        inputs = tokenizer(texts[start : start + PROMPTS_AT_ONCE], return_tensors="pt", padding=True).to(model.device)
        inputs.pop("token_type_ids", None)
        tokens = model.generate(
            **inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        said += tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


def share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


def answer_from_export(folder: Path, questions: Path) -> None:
    """Answers in a fresh process, with the export read by transformers alone (in fp32; fp16 is for storage)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    conversations = json.loads(questions.read_text(encoding="utf-8"))
    said = answers(model, AutoTokenizer.from_pretrained(folder), conversations)
    ours = sorted(name for name in sys.modules if name.startswith(("bitsandbytes", "peft")))
    print(json.dumps({"answers": said, "loaded": ours}))


def ask_fresh_process(folder: Path, conversations: list[list[dict[str, str]]]) -> list[str]:
    """Runs `answer_from_export` in a process of its own, and returns the answers."""
    questions = folder.parent / "questions.json"
    questions.write_text(json.dumps(conversations), encoding="utf-8")
    command = [sys.executable, __file__, "--answer", str(folder), str(questions)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the fresh process failed on {folder}:\n{done.stderr.strip()}")
    said: list[str] = json.loads(done.stdout.strip().splitlines()[-1])["answers"]
    return said


def fine_tune(model: Any, tokenizer: Any, size: Size, output: Path, profiler: MemoryProfiler) -> None:
    """Trains new adapters on generated messages. Short messages leave room to recompute nothing."""
    examples = tokenize_all(generate("train", size.training, seed=0), tokenizer).examples
    stream = batches(examples, size.batch, seed=0, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)  # A starts at random
    add_lora_(model, LoraConfig(rank=size.rank, alpha=2 * size.rank, target_modules="all-linear"))
    config = TrainConfig(
        steps=size.steps,
        learning_rate=size.learning_rate,
        lora_plus_ratio=size.lora_plus_ratio,
        warmup_steps=size.steps // 14,
        checkpointing="none",
    )
    train(model, stream, config, output_dir=output, overwrite=True, profiler=profiler)


def run(folder: Path, size: Size, output: Path) -> dict[str, Any]:
    """Runs all steps in order, and returns the figures of the last line."""
    began = time.perf_counter()
    heldout = generate("heldout", size.heldout, seed=1)
    conversations = [prompt_messages(example) for example in heldout]
    tokenizer = load_tokenizer(folder)
    # Every tensor of the first steps is traced. The others, and answers, run at full speed.
    with MemoryProfiler(traced_entries=TRACED_STEPS) as profiler:
        with profiler.phase("load"):
            model = load_quantized(folder, QuantConfig(format="nf4", double_quant=True, embedding_format="int8"))
        profiler.track(model)
        with profiler.phase("answers before", trace=False), decode_copies(model):  # for as long as it answers
            before = answers(model, tokenizer, conversations)
        print(f"loaded as NF4 in {time.perf_counter() - began:.0f} s; it answers {before[0]!r}")
        fine_tune(model, tokenizer, size, output, profiler)
        with profiler.phase("answers after", trace=False):
            model.float()  # the dtype of the fresh process, so that differences come from the export; packed bytes stay
            after = answers(model, tokenizer, conversations)
        save_adapter(model, output / "adapter", overwrite=True)
        with profiler.phase("export"):
            export_merged(model, output / "merged", dtype=torch.float16, overwrite=True)
    report = profiler.report()
    print(f"trained; it answers {after[0]!r}\n\nmemory by phase:\n{render(report)}")
    exported = ask_fresh_process(output / "merged", conversations)
    peaks = [phase.resident_peak for phase in report.phases]
    return {
        "exact_match_before": share([exact_match(a, e) for a, e in zip(before, heldout, strict=True)]),
        "exact_match_after": share([exact_match(a, e) for a, e in zip(after, heldout, strict=True)]),
        "exports_agree": share([a == b for a, b in zip(after, exported, strict=True)]),
        "peak_rss_bytes": None if None in peaks else max(peaks),
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--tiny", action="store_true", help="a random model of two small layers instead of the real one"
    )
    parser.add_argument("--output", type=Path, default=Path("out/quickstart"), help="folder of adapter and export")
    parser.add_argument("--answer", nargs=2, type=Path, metavar=("FOLDER", "QUESTIONS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.answer:
        answer_from_export(*given.answer)
        return
    given.output.mkdir(parents=True, exist_ok=True)
    if given.tiny:
        from tiny_model import make_tiny_model

        shutil.rmtree(given.output / "tiny-base", ignore_errors=True)
        folder, size = make_tiny_model(given.output / "tiny-base"), TINY
    else:
        folder, size = fetch_model(), FULL
    figures = run(folder, size, given.output)
    peak = figures["peak_rss_bytes"]
    print(f"exact match on {size.heldout} held-out messages: {figures['exact_match_before']:.2f} before, ", end="")
    print(
        f"{figures['exact_match_after']:.2f} after; the export gives the same answer to {figures['exports_agree']:.2f}"
    )
    print(f"peak resident memory {'unknown' if peak is None else readable_bytes(peak)}, {figures['seconds']} s")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
