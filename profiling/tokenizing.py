"""How fast, and in how much memory, do 100,000 chats become tokens with labels, compared with trl and datasets.map?

    python profiling/tokenizing.py                  # about fifteen minutes on two cores, 2 GB of disk
    python profiling/tokenizing.py --records 5000   # fewer chats
    python profiling/tokenizing.py --growth         # also twice as many chats: does memory grow with them?
    python profiling/tokenizing.py --model FOLDER   # the tokenizer of another model than SmolLM2-135M-Instruct
    python profiling/tokenizing.py --tiny           # a few hundred chats, a random model, peers with two processes only

The chats (parts/chats.py) have one to three turns and about 300 tokens of SmolLM2. Each way runs in a process of its
own on two cores, one after the other (parts/token_worker.py says what each does). Only our second start finds what an
earlier run wrote. `labels_equal_trl` says whether every token and label is that of trl.

Prints tables and ends with one JSON line. `seconds_100k` is scaled to 100,000 chats. `time_ratio` is ours to the
fastest peer that makes labels with two processes, `ratios` ours to each. The peaks of peers with several processes are
those of their main process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from parts.chats import write_chats
from parts.example_models import model_folder
from parts.machine_floor import cpu_name

WORKER = Path(__file__).resolve().parent / "parts" / "token_worker.py"

MIB = 1 << 20
RECORDS, TINY_RECORDS = 100_000, 300
MESSAGES = [80, 160]
FIRST, SECOND = "ours, first start", "ours, second start"
PEERS = {
    "trl": "trl, SFTTrainer",
    "prefixes": "datasets.map, prefixes",
    "bare": "datasets.map, no labels",
}
WITHOUT_LABELS = "bare"
# The aims. Results that miss them are printed all the same.
AIMS = {
    "seconds_100k": 60.0,
    "second_start_seconds": 2.0,
    "peak_mib_above_tokenizer": 300.0,
    "time_ratio": 0.5,
    "growth_160_over_80": 2.2,
}


def run(way: str, model: Path, file: Path, scratch: Path, processes: int | None = None) -> dict[str, Any]:
    """Runs one worker and returns its figures."""
    place = scratch / "worker"
    place.mkdir()
    given = {"way": way, "model": str(model), "file": str(file), "scratch": str(place / "trainer")}
    given |= {"cache": str(place / "datasets"), "processes": processes, "messages": MESSAGES}
    surroundings = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, str(WORKER), json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=surroundings)
    if done.returncode:
        raise SystemExit(f"{way} ended with status {done.returncode}:\n{done.stderr.strip()[-2000:]}")
    shutil.rmtree(place)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measured(model: Path, file: Path, scratch: Path, processes: list[int]) -> dict[str, dict[str, Any]]:
    """Returns the figures of all ways."""
    figures = {name: run("ours", model, file, scratch) for name in (FIRST, SECOND)}
    if figures[FIRST]["was_cached"] or not figures[SECOND]["was_cached"]:
        raise SystemExit("the second start, and only that, must read the tokens from the cache")
    for way, name in PEERS.items():
        for count in processes:
            # datasets starts a process even for num_proc=1; its default is the process itself.
            key = f"{name}, {count} process{'es' * (count > 1)}"
            figures[key] = run(way, model, file, scratch, count if count > 1 else None)
            print(f"{key}: {figures[key]['seconds']:.1f} s", file=sys.stderr, flush=True)
    return figures


def summary(figures: dict[str, dict[str, Any]], records: int) -> dict[str, Any]:
    """Returns what is read from the figures."""
    first, second = figures[FIRST], figures[SECOND]
    ratios = {name: first["seconds"] / one["seconds"] for name, one in figures.items() if name not in (FIRST, SECOND)}
    trl = [one for name, one in figures.items() if name.startswith(PEERS["trl"])]
    same = ("tokens", "learned", "digest")
    return {
        "records": records,
        "tokens": first["tokens"],
        "learned_tokens": first["learned"],
        "bytes_per_token": first["on_disk"] / first["tokens"],
        "seconds_100k": first["seconds"] * RECORDS / records,
        "second_start_seconds": second["seconds"],
        "peak_mib_above_tokenizer": first["peak"] / MIB,
        "anonymous_peak_mib": first["anonymous"] / MIB,
        "time_ratio": max(
            ratio
            for name, ratio in ratios.items()
            if name.endswith("2 processes") and not name.startswith(PEERS[WITHOUT_LABELS])
        ),
        "ratios": ratios,
        "seconds": {name: one["seconds"] for name, one in figures.items()},
        "cpu_seconds": {name: one["cpu_seconds"] for name, one in figures.items()},
        "labels_equal_trl": all(one[key] == first[key] for one in trl for key in same),
    }


def tables(figures: dict[str, dict[str, Any]], results: dict[str, Any]) -> list[Table]:
    title = f"{results['records']:,} chats, {results['tokens'] / 1e6:,.1f} million tokens, {results['cpu']}"
    ways = Table("way", "s", "CPU s", "ours to it", "peak, MiB", "anonymous, MiB", title=title)
    for name, one in figures.items():
        ratio = f"{results['ratios'][name]:.2f}" if name in results["ratios"] else ""
        sizes = (f"{one[key] / MIB:,.0f}" for key in ("peak", "anonymous"))
        ways.add_row(name, f"{one['seconds']:,.1f}", f"{one['cpu_seconds']:,.1f}", ratio, *sizes)
    aims = Table("figure", "measured", "aim, at most")
    for name, aim in AIMS.items():
        aims.add_row(name, f"{results[name]:,.2f}", f"{aim:g}")
    return [ways, aims]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="few chats and a random model")
    parser.add_argument("--records", type=int, help="number of chats")
    parser.add_argument("--model", type=Path, help="folder of a model with a chat template")
    parser.add_argument("--growth", action="store_true", help="also measure twice as many chats")
    given = parser.parse_args()
    records = given.records if given.records is not None else TINY_RECORDS if given.tiny else RECORDS
    if records < 2:
        parser.error(f"--records must be at least 2; got {records}")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model = given.model.resolve() if given.model else model_folder(given.tiny, scratch)
        file = write_chats(scratch / "chats.jsonl", records)
        figures = measured(model, file, scratch, [2] if given.tiny else [1, 2])
        results = {"cpu": cpu_name(), **summary(figures, records)}
        short, long = run("long", model, file, scratch)["seconds"]
        results |= {"growth_160_over_80": long / short, "peak_growth": None}
        if given.growth:
            figures["ours, twice as many chats"] = run("ours", model, write_chats(file, 2 * records), scratch)
            results["peak_growth"] = figures["ours, twice as many chats"]["peak"] / figures[FIRST]["peak"]
    console = Console()
    console.width = max(100, console.width)
    for table in tables(figures, results):
        console.print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
