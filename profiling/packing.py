"""How fast is a weight packed and unpacked, compared with bitsandbytes' own functions, and in how much memory?

    python profiling/packing.py            # a weight of 4096 x 14336 (the largest of Llama-3-8B), half a minute
    python profiling/packing.py --tiny

Packing: NF4 in blocks of 64; the codes of both sides are compared. Unpacking: the product of the weight and 16 rows,
ours in slices of rows, theirs at once. Temporaries are live tensor bytes besides weight, codes and result. Prints a
table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qlora_lite import QuantConfig
from qlora_lite.compute.host_memory import set_host_limits
from qlora_lite.compute.lora_linear import adapted_linear
from qlora_lite.memory.trace import StorageTrace
from qlora_lite.quantization.kernels import bnb
from qlora_lite.quantization.packed_weight import PackedWeight

SHAPE, TINY_SHAPE = (4096, 14336), (256, 512)
ROWS = 16
REPEATS = 5
MIB = 1 << 20


def measured(work: Callable[[], Any], result_bytes: int) -> dict[str, float]:
    """Returns the median seconds of a call, and the peak of its temporaries in bytes."""
    work()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    with StorageTrace() as trace:
        before = trace.live_bytes()
        held = work()
        most, _ = trace.peak()
    del held
    return {"seconds": statistics.median(seconds), "temporaries": most - before - result_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a small weight")
    shape = TINY_SHAPE if parser.parse_args().tiny else SHAPE
    torch.manual_seed(0)
    set_host_limits()
    config = QuantConfig(format="nf4", double_quant=False)
    weight, x = torch.randn(shape).mul_(0.02).bfloat16(), torch.randn(ROWS, shape[1]).bfloat16()
    ours = PackedWeight.of(weight, config)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    inputs = weight.nbytes
    packed = ours.storage_bytes()
    result = ROWS * shape[0] * 2
    # The trace also sees the inputs of a call, which are not temporaries.
    figures = {
        "pack, ours": measured(lambda: PackedWeight.of(weight, config), inputs + packed),
        "pack, bitsandbytes": measured(
            lambda: bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4"), inputs + packed
        ),
        "unpack and multiply, ours": measured(lambda: adapted_linear(x, ours), packed + x.nbytes + result),
        "unpack and multiply, bitsandbytes": measured(
            lambda: torch.nn.functional.linear(x, bnb.dequantize_4bit(codes, state)), packed + x.nbytes + result
        ),
    }
    table = Table("", "ms", "million values/s", "temporaries (MiB)", title=f"a weight of {shape[0]} x {shape[1]}")
    for name, row in figures.items():
        speed = weight.numel() / row["seconds"] / 1e6
        table.add_row(name, f"{row['seconds'] * 1e3:,.1f}", f"{speed:,.0f}", f"{row['temporaries'] / MIB:,.1f}")
    Console().print(table)

    def ratio(work: str) -> float:
        return figures[f"{work}, bitsandbytes"]["seconds"] / figures[f"{work}, ours"]["seconds"]

    summary = {
        "pack_speed_ratio": ratio("pack"),
        "pack_temporaries": figures["pack, ours"]["temporaries"],
        "codes_equal": torch.equal(ours.packed, codes.view(-1)) and torch.equal(ours.absmax, state.absmax),
        "unpack_speed_ratio": ratio("unpack and multiply"),
        "unpack_temporaries": figures["unpack and multiply, ours"]["temporaries"],
        "unpacked_bytes": weight.nbytes,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
