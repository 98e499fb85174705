"""Turns a file of chats into tokens in one way, in a process of its own; tokenizing.py starts it.

    python profiling/parts/token_worker.py '{"way": "ours", "model": "...", "file": "...", "scratch": "...", ...}'

The time begins with the tokenizer loaded and all packages imported, and ends with the tokens on disk. `peak` is VmHWM
above resident memory at that time, `anonymous` the same of RssAnon (sampled), which leaves out files that are mapped.
Prints a JSON line with these, the CPU time of the process and its children, the number of tokens and of learned ones,
and a SHA-256 of all token ids and labels.

ours      tokenize_sources; the file's cache is next to it, so that a second process reads it
trl       load_dataset, and what SFTTrainer's own _prepare_dataset does with assistant_only_loss=True: it marks answers
          with a template that has {% generation %}. Nothing is truncated, as above, which spares it two passes
prefixes  load_dataset, and map with the labels that users write by hand: the chat template writes the conversation up
          to each answer, and with it, and the lengths of both tell which tokens are learned. A token behind the end of
          the turn is learned too
bare      load_dataset, and map (batched) with apply_chat_template: tokens without labels, less than training needs
long      seconds of one conversation by its number of messages, the best of several
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path, it finds the other parts

from parts.chats import Chats
from qlora_lite.checkpoints import load_tokenizer
from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.compute.host_memory import release_freed_pages
from qlora_lite.data import tokenize_all, tokenize_sources
from qlora_lite.memory.counters import reset_resident_peak, resident_bytes

SAMPLE_SECONDS = 0.05
REPEATS = 15
BATCH = 1000
# How these templates write a message, and the same with the answer marked, as transformers documents it.
MARKED = {
    # SmolLM2
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}": (
        "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    ),
    # examples/tiny_model.py
    "<{{ message['role'] }}>{{ message['content'] }}</s>": (
        "<{{ message['role'] }}>{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] }}</s>{% endgeneration %}"
        "{% else %}{{ message['content'] }}</s>{% endif %}"
    ),
}


def cpu_seconds() -> float:
    return sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


@contextmanager
def measured() -> Iterator[dict[str, Any]]:
    """Measures the block: seconds, CPU seconds, peaks above its start."""
    figures: dict[str, Any] = {}
    gc.collect()
    release_freed_pages()
    reset_resident_peak()
    start, anonymous = resident_bytes() or 0, resident_bytes("RssAnon") or 0
    most, done = anonymous, threading.Event()

    def sample() -> None:
        nonlocal most
        while not done.wait(SAMPLE_SECONDS):
            most = max(most, resident_bytes("RssAnon") or 0)

    sampler = threading.Thread(target=sample)
    sampler.start()
    cpu, began = cpu_seconds(), time.perf_counter()
    try:
        yield figures
    finally:
        figures |= {"seconds": time.perf_counter() - began, "cpu_seconds": cpu_seconds() - cpu}
        figures["peak"] = (resident_bytes("VmHWM") or 0) - start
        done.set()
        sampler.join()
        figures["anonymous"] = most - anonymous


class Sum:
    """Counts tokens and learned tokens, and sums up which they are."""

    def __init__(self) -> None:
        self.tokens = self.learned = 0
        self._ids, self._labels = hashlib.sha256(), hashlib.sha256()

    def add(self, ids: NDArray[Any], labels: NDArray[Any]) -> None:
        self._ids.update(ids.astype("<i4").tobytes())
        self._labels.update(labels.astype("<i4").tobytes())
        self.tokens += len(ids)
        self.learned += int((labels != IGNORE_INDEX).sum())

    def figures(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._ids.digest() + self._labels.digest()).hexdigest()
        return {"tokens": self.tokens, "learned": self.learned, "digest": digest}


def ours(model: str, file: str, **rest: Any) -> dict[str, Any]:
    tokenizer = load_tokenizer(model)
    with measured() as figures:
        found = tokenize_sources([file], tokenizer)
    total = Sum()
    arrays = found.parts[0].arrays
    for piece in arrays.tokens.split(1 << 20):
        signed = piece.numpy()
        total.add(np.where(signed < 0, ~signed, signed), np.where(signed < 0, IGNORE_INDEX, signed))
    folder = Path(file).parent / f".{Path(file).name}.tokens"
    on_disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    was_cached = found.parts[0].was_cached
    return {**figures, **total.figures(), "examples": len(arrays), "on_disk": on_disk, "was_cached": was_cached}


def peer_figures(figures: dict[str, Any], dataset: Any) -> dict[str, Any]:
    total = Sum()
    labelled = "labels" in dataset.column_names
    for table in dataset.with_format("arrow").iter(BATCH):
        ids = table["input_ids"].combine_chunks().flatten().to_numpy()
        labels = table["labels"].combine_chunks().flatten().to_numpy() if labelled else np.full_like(ids, IGNORE_INDEX)
        total.add(ids, labels)
    return {**figures, **total.figures(), "examples": len(dataset)}


def load_chats(file: str, cache: str) -> Any:
    import datasets

    return datasets.load_dataset("json", data_files=file, split="train", cache_dir=cache)


def training_template(tokenizer: Any) -> str:
    """The tokenizer's chat template with its answers marked. trl has such templates for other models."""
    template: str = tokenizer.chat_template
    for written, marked in MARKED.items():
        if written in template:
            return template.replace(written, marked)
    from trl.chat_template_utils import get_training_chat_template

    try:
        return get_training_chat_template(tokenizer) or template
    except ValueError as error:
        raise SystemExit(f"answers cannot be marked in this chat template: {error}") from error


def trl(model: str, file: str, scratch: str, cache: str, processes: int | None, **rest: Any) -> dict[str, Any]:
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = training_template(tokenizer)
    figures: dict[str, Any] = {}

    class Timed(SFTTrainer):
        def _prepare_dataset(self, dataset: Any, *given: Any) -> Any:
            with measured() as found:
                prepared = super()._prepare_dataset(load_chats(file, cache), *given)
            figures.update(found)
            return prepared

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = SFTConfig(
        scratch,
        assistant_only_loss=True,
        max_length=None,
        dataset_num_proc=processes,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    with open(file, encoding="utf-8") as lines:  # the trainer looks at a record before it prepares all
        first = datasets.Dataset.from_list([json.loads(next(lines))])
    network = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **small))
    trainer = Timed(network, config, train_dataset=first, processing_class=tokenizer)
    return peer_figures(figures, trainer.train_dataset)


def by_prefixes(example: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    messages = example["messages"]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    labels = [IGNORE_INDEX] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(
                messages[:index], tokenize=True, return_dict=False, add_generation_prompt=True
            )
            with_it = tokenizer.apply_chat_template(messages[: index + 1], tokenize=True, return_dict=False)
            labels[len(before) : len(with_it)] = ids[len(before) : len(with_it)]
    return {"input_ids": ids, "labels": labels}


def bare_tokens(batch: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    return {"input_ids": tokenizer.apply_chat_template(batch["messages"], tokenize=True, return_dict=False)}


def mapped(
    work: Callable[..., Any], model: str, file: str, cache: str, processes: int | None, **options: Any
) -> dict[str, Any]:
    import datasets  # noqa: F401 - before the time begins

    tokenizer = load_tokenizer(model)
    options |= {"fn_kwargs": {"tokenizer": tokenizer}, "remove_columns": ["messages"], "num_proc": processes}
    with measured() as figures:
        dataset = load_chats(file, cache).map(work, **options)
    return peer_figures(figures, dataset)


def prefixes(model: str, file: str, cache: str, processes: int | None, **rest: Any) -> dict[str, Any]:
    return mapped(by_prefixes, model, file, cache, processes)


def bare(model: str, file: str, cache: str, processes: int | None, **rest: Any) -> dict[str, Any]:
    return mapped(bare_tokens, model, file, cache, processes, batched=True)


def long(model: str, messages: list[int], **rest: Any) -> dict[str, Any]:
    tokenizer = load_tokenizer(model)
    shortest = min(messages)
    chat = Chats().chat(turns=shortest // 2)[-shortest:]  # without a system message
    # Repeated, so that a conversation of twice as many messages has twice the text.
    records = {count: {"messages": chat * (count // shortest)} for count in messages}
    seconds = {count: float("inf") for count in messages}
    for _ in range(REPEATS):
        for count, record in records.items():
            began = time.perf_counter()
            tokenize_all([record], tokenizer)
            seconds[count] = min(seconds[count], time.perf_counter() - began)
    return {"seconds": [seconds[count] for count in messages]}


WAYS = {way.__name__: way for way in (ours, trl, prefixes, bare, long)}


def main() -> None:
    given = json.loads(sys.argv[1])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    print(json.dumps(WAYS[given.pop("way")](**given)))


if __name__ == "__main__":
    main()
