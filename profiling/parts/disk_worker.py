"""Trains with a base in memory or on disk, in a process of its own; out_of_core.py starts it.

    python profiling/parts/disk_worker.py '{"model": "...", "base": "disk"}'

Before each step the file of the base is dropped from the page cache (posix_fadvise(2)), so that every step reads the
disk. Prints a JSON line: seconds and processor seconds of each step, bytes that the process read from the disk in it,
the resident peak of the process, anonymous and file pages, above that with all imports made, losses, and a hash of the
trained adapters.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_lite import LoraConfig, QuantConfig, TrainConfig, add_lora_, load_quantized, train
from qlora_lite.checkpoints.safetensors_write import raw_bytes
from qlora_lite.lora.adapters import adapter_parameters
from qlora_lite.memory.counters import resident_bytes
from qlora_lite.offload.mapped_file import mapped_spans

RANK, ALPHA = 16, 32
TOKEN_IDS = 100  # ids that every tokenizer has


@dataclass(frozen=True)
class DiskWork:
    """The work of one worker. steps: 0 loads the model only, which packs it."""

    model: str
    base: str
    embedding_format: str = "none"
    optimizer: str = "adamw"
    tokens: int = 512
    steps: int = 4

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def bytes_read() -> int:
    """Returns the bytes that this process has caused to be read from a disk."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


class Batches:
    """The same batch for each step. Notes time, processor time and bytes read when it is asked for one."""

    def __init__(self, work: DiskWork, files: set[Path]) -> None:
        ids = torch.randint(TOKEN_IDS, (1, work.tokens), generator=torch.Generator().manual_seed(0))
        self._batch = {"input_ids": ids, "labels": ids}
        self._files = files
        self.notes: list[tuple[float, float, int]] = []

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            self.note()
            for path in self._files:
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)
            yield self._batch

    def note(self) -> None:
        self.notes.append((time.perf_counter(), time.process_time(), bytes_read()))

    def per_step(self, number: int) -> list[float]:
        values = [note[number] for note in self.notes]
        return [after - before for before, after in itertools.pairwise(values)]


def run(work: DiskWork) -> dict[str, Any]:
    import transformers.models.llama.modeling_llama  # noqa: F401

    empty, began = resident_bytes() or 0, time.perf_counter()
    model = load_quantized(work.model, QuantConfig(embedding_format=work.embedding_format), base=work.base)
    load = {"load_seconds": time.perf_counter() - began, "load_peak": (resident_bytes("VmHWM") or 0) - empty}
    if not work.steps:
        return load
    torch.manual_seed(0)
    add_lora_(model, LoraConfig(rank=RANK, alpha=ALPHA))
    spans = [*mapped_spans((*model.parameters(), *model.buffers()))]
    batches = Batches(work, {file.path for _, file, _ in spans})
    config = TrainConfig(steps=work.steps, checkpointing="full", optimizer=work.optimizer)
    result = train(model, batches, config, progress=False)
    batches.note()
    digest = hashlib.sha256()
    for value in adapter_parameters(model).values():
        digest.update(raw_bytes(value))
    return load | {
        "empty": empty,
        "peak": (resident_bytes("VmHWM") or 0) - empty,
        "on_disk": sum(span.stop - span.start for _, _, span in spans),
        "seconds": batches.per_step(0),
        "cpu_seconds": batches.per_step(1),
        "bytes_read": [int(count) for count in batches.per_step(2)],
        "losses": result.losses,
        "adapters": digest.hexdigest(),
    }


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    print(json.dumps(run(DiskWork(**json.loads(sys.argv[1])))))


if __name__ == "__main__":
    main()
