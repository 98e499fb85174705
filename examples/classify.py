"""Does a classifier on a 4-bit base learn real categories, and does peft read it?

    python examples/classify.py --tiny                             # a random model of two small layers, made-up texts
    python examples/classify.py --model path --corpus folder       # the questions of chatterbot-corpus by category

The corpus is the folder `chatterbot_corpus/data/english` of the package chatterbot-corpus (BSD). The class of a
question is the file that it stands in. Questions that differ only in case and punctuation are one. A quarter of them
is held out. The adapter and the head, trained whole, are loaded into peft on an unpacked base, and the logits
compared. The last line is one JSON object; the exit status is 1 if the logits differ.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from qlora_lite import (
    LoraConfig,
    QuantConfig,
    TrainConfig,
    add_lora_,
    load_adapter_,
    load_quantized,
    save_adapter,
    train,
)
from qlora_lite.checkpoints import load_tokenizer
from qlora_lite.data import tokenize_sources
from qlora_lite.data.tasks import TaskDataConfig, find_labels, task_batches
from qlora_lite.training import held_out_scores
from tiny_model import make_tiny_model

TASK = "sequence-classification"
CATEGORIES, PER_CATEGORY = ("ai", "coding", "psychology", "trivia"), 60
HELD_OUT = 0.25
TOLERANCE = 1e-4


def corpus_records(folder: Path) -> list[dict[str, str]]:
    """Returns questions of the corpus with their categories, as many of each, and each once."""
    records = []
    for category in CATEGORIES:
        found: dict[str, dict[str, str]] = {}
        for line in (folder / f"{category}.yml").read_text(encoding="utf-8").splitlines():
            if line.startswith("- - "):
                text = line[4:].strip().strip("'\"")
                found.setdefault(" ".join(re.findall(r"\w+", text.lower())), {"text": text, "label": category})
        records += [found[key] for key in sorted(found)[:PER_CATEGORY]]
    return records


def made_up_records() -> list[dict[str, str]]:
    """Returns texts whose class is their first word."""
    return [{"text": f"{label} {number}", "label": label} for number in range(30) for label in ("warm", "cold")]


@torch.no_grad()
def logits_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits


def difference_to_peft(folder: Path, adapter: Path, names: list[str], batch: dict[str, torch.Tensor]) -> float:
    """Returns by what share of the largest logit peft differs, on a base that is not packed."""
    import peft
    from transformers import AutoModelForSequenceClassification

    pad = load_tokenizer(folder).pad_token_id
    base = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, num_labels=len(names), pad_token_id=pad
    )
    theirs = logits_of(peft.PeftModel.from_pretrained(base, adapter), batch)
    ours: Any = load_quantized(folder, QuantConfig(format="none"), dtype=torch.float32, task=TASK, labels=names)
    load_adapter_(ours, adapter)
    return float((logits_of(ours, batch) - theirs).abs().max() / theirs.abs().max())


def run(folder: Path, records: list[dict[str, str]], output: Path, steps: int, rate: float) -> dict[str, Any]:
    """Trains a classifier, prints its scores before and after, and compares it with peft's."""
    data = output / "records.jsonl"
    data.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    found = tokenize_sources([data], tokenizer, TaskDataConfig(max_length=64, task=TASK), cache=False)
    labels, (kept, held_out) = find_labels(found.examples, TASK), found.examples.held_out(HELD_OUT)
    print(f"{len(kept)} questions to train on, {len(held_out)} held out; {labels.in_words()}")

    began = time.perf_counter()
    model = load_quantized(folder, QuantConfig(format="nf4"), task=TASK, labels=labels.for_model)
    model.config.pad_token_id = pad = tokenizer.pad_token_id
    torch.manual_seed(0)
    add_lora_(model, LoraConfig(rank=8, alpha=16))
    scores = [held_out_scores(model, task_batches(held_out, labels, 8, 0, pad_token_id=pad, epochs=1))]
    batches = task_batches(kept, labels, 8, 0, pad_token_id=pad)
    train(model, batches, TrainConfig(steps=steps, learning_rate=rate, warmup_steps=5), progress=False)
    scores.append(held_out_scores(model, task_batches(held_out, labels, 8, 0, pad_token_id=pad, epochs=1)))
    seconds = time.perf_counter() - began
    for when, own in zip(("before", "after"), scores, strict=True):
        print(f"{when:<6}  " + "  ".join(f"{name} {score:.3f}" for name, score in own.items()))

    save_adapter(model, output / "adapter")
    batch = next(task_batches(held_out, labels, 8, 0, pad_token_id=pad))
    difference = difference_to_peft(folder, output / "adapter", list(labels.names), batch)
    print(f"peft, with this adapter and head on the unpacked base: logits differ by {difference:.1e}")
    return {
        "accuracy_before": scores[0]["accuracy"],
        "accuracy_after": scores[1]["accuracy"],
        "f1_after": scores[1]["f1"],
        "seconds": round(seconds, 1),
        "difference_to_peft": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a random model and made-up texts")
    parser.add_argument("--model", type=Path, help="folder of a transformers checkpoint")
    parser.add_argument("--corpus", type=Path, help="folder of chatterbot-corpus with its .yml files")
    parser.add_argument("--steps", type=int, help="default: 60, with --tiny 8")
    options = parser.parse_args()
    if not options.tiny and not (options.model and options.corpus):
        parser.error("give --tiny, or --model and --corpus")
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary)
        folder = make_tiny_model(output / "model") if options.tiny else options.model
        records = made_up_records() if options.tiny else corpus_records(options.corpus)
        steps, rate = (8, 1e-2) if options.tiny else (60, 5e-4)
        figures = run(folder, records, output, options.steps or steps, rate)
    print(json.dumps(figures))
    raise SystemExit(int(figures["difference_to_peft"] > TOLERANCE))


if __name__ == "__main__":
    main()
