"""How do loading and exporting compare with transformers + peft + bitsandbytes, and does memory grow with the model?

    python profiling/streaming_io.py            # about five minutes on two cores, 12 GB of disk
    python profiling/streaming_io.py --tiny     # random models of a few layers, in seconds

Loads a 1.1B Llama shape (five bf16 shards, random weights) as NF4 with double quantization, exports it with an adapter
as fp16, and merges the adapter into the original from disk to disk, at 0.3B and 3B too. Each side of each case runs in
a process of its own (parts/io_worker.py). Our times include the sync of the written files to disk; the peer does not
sync. Prints a table and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from parts.example_models import make_tiny_model
from parts.model_shapes import make_adapter, make_shape

WORKER = Path(__file__).resolve().parent / "parts" / "io_worker.py"

MIB = 1 << 20
GROWTH = ("llama-300m", "llama-1b", "llama-3b")
# The aims. Results that miss them are printed all the same.
AIMS = {
    "load_time_ratio": 0.25,
    "load_peak_ratio": 0.35,
    "export_time_ratio": 0.30,
    "export_extra_bytes": 300 * MIB,
    "merge_time_ratio": 0.5,
    "merge_peak_bytes": 700 * MIB,
    "merge_peak_growth": 1.10,
}


def work(what: str, model: Path, adapter: Path, scratch: Path) -> dict[str, Any]:
    """Runs one worker and returns its figures."""
    output = scratch / what
    given = {"what": what, "model": str(model), "adapter": str(adapter), "output": str(output)}
    command = [sys.executable, str(WORKER), json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{what} ended:\n{done.stderr.strip()[-2000:]}")
    if output.is_dir():
        shutil.rmtree(output)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def compare(models: list[tuple[Path, Path]], scratch: Path) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Returns the figures of all works, and the ratios for the middle model."""
    middle = models[len(models) // 2]
    names = ("peer_load", "ours_load", "peer_export", "ours_export", "peer_merge", "ours_merge")
    figures = {name: work(name, *middle, scratch) for name in names}
    for model, adapter in models:
        key = f"ours_merge {model.name}"
        figures[key] = figures["ours_merge"] if model == middle[0] else work("ours_merge", model, adapter, scratch)
    peaks = [figures[f"ours_merge {model.name}"]["process_peak"] for model, _ in models]

    def ratio(case: str, key: str) -> float:
        return float(figures[f"ours_{case}"][key] / figures[f"peer_{case}"][key])

    return figures, {
        "load_time_ratio": ratio("load", "seconds"),
        "load_peak_ratio": ratio("load", "peak"),
        "export_time_ratio": ratio("export", "seconds"),
        "export_extra_bytes": figures["ours_export"]["peak"],
        "merge_time_ratio": ratio("merge", "seconds"),
        "merge_peak_bytes": figures["ours_merge"]["process_peak"],
        "merge_peak_growth": max(peaks) / min(peaks),
    }


def tables(figures: dict[str, dict[str, Any]], results: dict[str, float]) -> list[Table]:
    works = Table("work", "s", "peak above start, MiB", "left resident, MiB", "whole process, MiB")
    for name, one in figures.items():
        sizes = (f"{one[key] / MIB:,.0f}" for key in ("peak", "resident", "process_peak"))
        works.add_row(name, f"{one['seconds']:.1f}", *sizes)
    aims = Table("figure", "measured", "aim, at most")
    for name, value in results.items():
        form = (lambda size: f"{size / MIB:,.0f} MiB") if name.endswith("_bytes") else (lambda part: f"{part:.2f}")
        aims.add_row(name, form(value), form(AIMS[name]))
    return [works, aims]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="random models of a few small layers")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if given.tiny:
            folders = [make_tiny_model(Path(scratch) / f"tiny-{layers}", layers=layers) for layers in (1, 2, 3)]
        else:
            folders = [make_shape(name) for name in GROWTH]
        figures, results = compare([(folder, make_adapter(folder)) for folder in folders], Path(scratch))
    for table in tables(figures, results):
        Console(width=max(100, Console().width)).print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
