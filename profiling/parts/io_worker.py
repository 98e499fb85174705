"""Loads, exports or merges for one side of a comparison, in a process of its own; streaming_io.py starts it.

    python profiling/parts/io_worker.py '{"what": "ours_load", "model": "..."}'

Prints a JSON line: seconds of the work without imports, `peak` (VmHWM) above resident memory before it, and
`process_peak` of the whole process.

peer: transformers + peft + bitsandbytes as their documentation recommends: `BitsAndBytesConfig` (NF4 with double
quantization, computing in bf16) to load; `merge_and_unload`, `dequantize` and `save_pretrained` to export. For the
merge into the original: the model in fp16, `PeftModel`, `merge_and_unload`, `save_pretrained`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qlora_lite.compute.host_memory import release_freed_pages
from qlora_lite.memory.counters import reset_resident_peak, resident_bytes


def whole_peak() -> int:
    return resident_bytes("VmHWM") or 0


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Measures the block: seconds, peak and rest above its start, peak of the process in the block and overall."""
    figures: dict[str, float] = {}
    release_freed_pages()
    before = whole_peak()
    reset_resident_peak()
    start = resident_bytes() or 0
    began = time.perf_counter()
    yield figures
    seconds, peak = time.perf_counter() - began, whole_peak()
    resident = resident_bytes() or 0
    figures |= {"seconds": seconds, "peak": peak - start, "resident": resident - start, "peak_of_process": peak}
    figures["process_peak"] = max(before, peak)


@contextmanager
def reported() -> Iterator[None]:
    """Prints the figures of `measured`."""
    with measured() as figures:
        yield
    print(json.dumps(figures))


def ours_load(model: str, **rest: Any) -> None:
    import transformers.models.llama.modeling_llama  # noqa: F401

    from qlora_lite import QuantConfig, load_quantized

    with reported():
        kept = load_quantized(model, QuantConfig())
    del kept


def ours_export(model: str, adapter: str, output: str) -> None:
    from qlora_lite import QuantConfig, export_merged, load_adapter_, load_quantized

    loaded = load_quantized(model, QuantConfig())
    load_adapter_(loaded, adapter)
    with reported():
        export_merged(loaded, Path(output), torch.float16)


def ours_merge(model: str, adapter: str, output: str) -> None:
    import transformers.models.llama.modeling_llama  # noqa: F401

    from qlora_lite.export.merged import merge_checkpoint

    with reported():
        merge_checkpoint(model, adapter, output, dtype=torch.float16, base="original")


def peer_model(model: str) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(model, quantization_config=quantization, dtype=torch.bfloat16)


def peer_load(model: str, **rest: Any) -> None:
    import bitsandbytes  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    with reported():
        kept = peer_model(model)
    del kept


def peer_export(model: str, adapter: str, output: str) -> None:
    import peft

    loaded = peft.PeftModel.from_pretrained(peer_model(model), adapter)
    with reported():
        merged = loaded.merge_and_unload().dequantize().to(torch.float16)
        merged.save_pretrained(output)


def peer_merge(model: str, adapter: str, output: str) -> None:
    import peft
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoModelForCausalLM

    with reported():
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16)
        merged = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()
        merged.save_pretrained(output)


WORKS = {work.__name__: work for work in (ours_load, ours_export, ours_merge, peer_load, peer_export, peer_merge)}


def main() -> None:
    torch.set_num_threads(2)
    given = json.loads(sys.argv[1])
    WORKS[given.pop("what")](**given)


if __name__ == "__main__":
    main()
