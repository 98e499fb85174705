"""Makes bad files from a seed: a good file with damage, or a well-formed one with false statements."""

from __future__ import annotations

import io
import json
import math
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

TENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_TENSORS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ADAPTER_BASE = "qlora_lite_base.json"
RECORDS = "data.jsonl"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def damaged_text(text: bytes, rng: random.Random) -> bytes:
    """Returns the text with bytes removed, repeated, flipped or inserted."""
    changed = bytearray(text)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            del changed[at : at + rng.choice([1, 3, 40])]
        elif kind == 1:
            changed[at:at] = rng.choice(
                [b"\xff", b"\x00", b"[" * 5000, b"{" * 5000, b"9" * 5000, b"NaN", b'"', b",", b"\xed\xa0\x80", b"-"]
            )
        elif kind == 2 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        else:
            changed[at:at] = changed[:at]
    return bytes(changed)


def good_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(4, 6, generator=generator),
        "b": torch.randn(3, generator=generator).to(torch.bfloat16),
        "c": torch.arange(10, dtype=torch.int64),
        "d": torch.zeros(0, 5),
        "e": torch.tensor(True),
        "f": torch.randint(255, (7, 2), dtype=torch.uint8, generator=generator),
    }


def _good_bytes() -> bytes:
    return safetensors.torch.save(good_tensors())


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _joined(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def _lie(header: dict[str, Any], body: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Makes one statement of the header false."""
    name = rng.choice(sorted(header))
    entry, other = header[name], header[rng.choice(sorted(header))]
    begin, end = entry["data_offsets"]
    lies: dict[str, Callable[[], Any]] = {
        "dtype": lambda: entry.update(dtype=rng.choice(["F32", "F16", "I8", "F8_E4M3", "F4", "X", "", 5, None])),
        "shape": lambda: entry.update(
            shape=rng.choice([[], [0], [-1], [2**63], [2**32, 2**32], [1.5], "4", None, [[4]], [True], [10**30]])
        ),
        "same bytes, other shape": lambda: entry.update(shape=[math.prod(entry["shape"])]),
        "offsets": lambda: entry.update(
            data_offsets=rng.choice([[end, begin], [-1, end], [begin, 2**64], [begin], [], None, [0.5, end], "0"])
        ),
        "overlap": lambda: entry.update(data_offsets=list(other["data_offsets"])),
        "shifted": lambda: entry.update(data_offsets=[begin + 1, end + 1]),
        "beyond the file": lambda: entry.update(data_offsets=[begin, len(body) + rng.randrange(1, 1 << 40)]),
        "missing entry": lambda: header.pop(name),
        "missing field": lambda: entry.pop(rng.choice(sorted(entry))),
        "entry of another type": lambda: header.update({name: rng.choice([1, None, [], "x", True])}),
        "metadata": lambda: header.update(__metadata__=rng.choice([1, [], {"a": 1}, {"a": {"b": "c"}}, "x", None])),
        "one more": lambda: header.update({f"{name}2": dict(entry)}),
        "name": lambda: header.update({rng.choice(["", "\x00", "../x", "é" * 50, "a" * 5000]): header.pop(name)}),
    }
    what = rng.choice(sorted(lies))
    lies[what]()
    return f"{what} of {name}", _joined(header, body)


def _whole_header(rng: random.Random, body: bytes) -> tuple[str, bytes]:
    """Makes a header that is malformed or far too large."""
    good = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    headers: dict[str, bytes] = {
        "no object": rng.choice([b"[]", b"null", b"1", b'"x"', b"", b" "]),
        "deep": b'{"a":' * 3000 + b"1" + b"}" * 3000,
        "deep lists": b"[" * 100_000,
        "duplicate": b"{" + good + b"," + good + b"}",
        "duplicate field": b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
        "bad UTF-8": b'{"\xff":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        "lone surrogate": b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        "NaN": b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}',
        "long number": b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}',
        "comma": b"{" + good + b",}",
        "many": b"{"
        + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(3000))
        + b"}",
    }
    what = rng.choice(sorted(headers))
    return what, _joined(headers[what], rng.choice([body, b"", b"\x01"]))


def damaged_safetensors(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Returns a description, and the bytes of a file with something wrong in it (rarely, with nothing)."""
    kind = rng.randrange(7)
    if kind == 0:
        cut = rng.randrange(len(data))
        return f"cut to {cut}", data[:cut]
    if kind == 1:
        changed = bytearray(data)
        limit = rng.choice([16, 200, len(data)])
        for _ in range(rng.choice([1, 1, 2, 8])):
            changed[rng.randrange(limit)] ^= 1 << rng.randrange(8)
        return f"bits of the first {limit} bytes", bytes(changed)
    if kind == 2:
        length = rng.choice([0, 1, 7, len(data), len(data) - 8, 2**31, 2**32, 2**62, 2**64 - 1, rng.getrandbits(64)])
        return f"header of {length}", length.to_bytes(8, "little") + data[8:]
    if kind == 3:
        return "more bytes", data + rng.randbytes(rng.choice([1, 8, 4096]))
    header, body = _split(data)
    header.pop("__metadata__", None)
    if kind in (4, 5):
        return _lie(header, body, rng)
    return _whole_header(rng, body)


def canary(folder: Path) -> bytes:
    """Returns a pickle that makes a folder `canary` next to `folder` when it is opened."""
    return b"cos\nmkdir\n(S'" + os.fsencode(folder.parent / "canary") + b"'\ntR."


def pickled(folder: Path) -> bytes:
    """Returns the pickle of `canary` in a zip file, as torch.save writes it."""
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", canary(folder))
            archive.writestr("archive/version", "3\n")
        return file.getvalue()


def damage_safetensors(folder: Path, rng: random.Random) -> str:
    what, data = damaged_safetensors(_good_bytes(), rng)
    (folder / TENSORS).write_bytes(data)
    return what


FOREIGN_NAMES = (
    *("../outside.safetensors", "/etc/passwd", "sub/../../outside.safetensors", "..", ".", "", "outside.bin", "\x00"),
    *(
        "/dev/zero",
        "/dev/stdin",
        "a\\..\\b.safetensors",
        "x" * 5000 + ".safetensors",
        "~/x.safetensors",
        "folder.safetensors",
    ),
    *("pipe.safetensors", "link.safetensors", "loop.safetensors", "missing.safetensors", 5, None, [], {}, True),
)


def put_shards(folder: Path) -> dict[str, Any]:
    """Writes the good tensors into two files, and returns the weight map of the index."""
    tensors = good_tensors()
    parts = (dict(list(tensors.items())[:3]), dict(list(tensors.items())[3:]))
    for shard, part in zip(SHARDS, parts, strict=True):
        safetensors.torch.save_file(part, folder / shard)
    return {name: shard for shard, part in zip(SHARDS, parts, strict=True) for name in part}


def damage_index(folder: Path, rng: random.Random) -> str:
    weight_map = put_shards(folder)
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "folder.safetensors").mkdir()
    (folder / "link.safetensors").symlink_to("/dev/zero")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    index: Any = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    name = rng.choice(sorted(weight_map))
    changes: dict[str, Callable[[], Any]] = {
        "name": lambda: weight_map.update({name: rng.choice(FOREIGN_NAMES)}),
        "other shard": lambda: weight_map.update({name: SHARDS[weight_map[name] == SHARDS[0]]}),
        "extra tensor": lambda: weight_map.update(extra=SHARDS[0]),
        "no map": lambda: index.update(weight_map=rng.choice([None, [], {}, 1, "x", [SHARDS[0]]])),
        "lost shard": lambda: (folder / rng.choice(SHARDS)).unlink(),
        "left out": lambda: weight_map.pop(name),
    }
    what = rng.choice([*sorted(changes), "bytes", "bytes"])
    if what in changes:
        changes[what]()
    text = json.dumps(index).encode()
    if what == "bytes":
        text = damaged_text(text, rng)
    (folder / INDEX).write_bytes(text)
    return what


STRANGE = (
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    2**31,
    float("nan"),
    float("inf"),
    "",
    "x",
    "16",
    [],
    [1],
    {},
    {"a": 1},
    [[["x"]]],
)


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = {"a": value}
    return value


def good_adapter() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    shapes = {"first": (6, 5), "second": (5, 4)}
    tensors: dict[str, torch.Tensor] = {}
    for name, (width, height) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, width)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(height, 2)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": sorted(shapes), "bias": "none"}
    return config, tensors


OPTIONS = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "peft_type", "bias", "use_dora", "use_rslora", "revision"),
    *("rank_pattern", "alpha_pattern", "modules_to_save", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *(
        "fan_in_fan_out",
        "init_lora_weights",
        "target_parameters",
        "trainable_token_indices",
        "invented",
        "auto_mapping",
    ),
    *("lora_bias", "ensure_weight_tying", "layer_replication", "inference_mode", "alora_invocation_tokens"),
)


def _strange_base(rng: random.Random) -> bytes:
    """Returns a record of the base of an adapter with one thing wrong in it."""
    sums: dict[str, Any] = {"layout": "0" * 64, "sample": "f" * 64, "packed": False}
    base: dict[str, Any] = {"version": 1, "model": {"model_type": "llama", "hidden_size": 6}, "weights": sums}
    if rng.random() < 0.5:
        return damaged_text(json.dumps(base).encode(), rng)
    section = rng.choice([base, base["model"], sums])
    section[rng.choice([*section, "more"])] = rng.choice([*STRANGE, nested(60)])
    return json.dumps(base).encode()


def damage_adapter(folder: Path, rng: random.Random) -> str:
    config, tensors = good_adapter()
    data = safetensors.torch.save(tensors)
    kind = rng.randrange(7)
    text: bytes | None = None
    if kind in (0, 1):
        option, value = rng.choice(OPTIONS), rng.choice([*STRANGE, nested(60)])
        config[option] = value
        what = f"{option} = {str(value)[:40]}"
    elif kind == 2:
        what, text = "config's bytes", damaged_text(json.dumps(config).encode(), rng)
    elif kind == 3:
        what, data = damaged_safetensors(data, rng)
    elif kind == 4:
        key = rng.choice(sorted(tensors))
        bad = tensors.pop(key)
        renamed = rng.choice([key + "x", "x" + key, key.replace("lora", "lora_embedding"), "", "first", key.upper()])
        tensors[renamed] = bad
        what, data = f"{key} as {renamed}", safetensors.torch.save(tensors)
    elif kind == 5:
        what = "the base's file"
        (folder / ADAPTER_BASE).write_bytes(_strange_base(rng))
    else:
        key = rng.choice(sorted(tensors))
        values = (
            tensors[key].T.contiguous(),
            tensors[key] * math.nan,
            tensors[key].int(),
            tensors[key][:1],
            torch.ones(()),
        )
        tensors[key] = rng.choice(values)
        what, data = f"values of {key}", safetensors.torch.save(tensors)
    (folder / ADAPTER_CONFIG).write_bytes(json.dumps(config).encode() if text is None else text)
    if rng.random() < 0.03:
        (folder / "adapter_model.bin").write_bytes(rng.choice([canary, pickled])(folder))
        return "a pickle"
    (folder / ADAPTER_TENSORS).write_bytes(data)
    return what


GOOD_RECORDS = (
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"prompt": "a", "completion": "b"},
    {"instruction": "a", "input": "", "output": "ü"},
    {"text": "plain"},
)


def damage_records(folder: Path, rng: random.Random) -> str:
    records = [json.loads(json.dumps(rng.choice(GOOD_RECORDS))) for _ in range(rng.randrange(1, 6))]
    kind = rng.randrange(4)
    if kind == 0:
        victim = rng.choice(records)
        victim[rng.choice(sorted(victim))] = rng.choice([*STRANGE, "\ud800", nested(40)])
    text = "\n".join(json.dumps(record, ensure_ascii=kind != 1) for record in records)
    encoding = rng.choice(["utf-8", "utf-16", "utf-32", "latin-1", "cp1252"]) if kind == 1 else "utf-8"
    data = text.encode(encoding)
    if kind == 2:
        data = damaged_text(data, rng)
    if kind == 3:
        data = rng.choice(
            [b"", b"\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf" + data, data + b"\r\n", b"[" * 100_000, b"\x00" * 50]
        )
    (folder / RECORDS).write_bytes(data)
    return f"{kind} in {encoding}"
