"""Bad files, made from a seed: each damages a good file, or lies in a well-formed one."""

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


def damaged_text(text: bytes, chance: random.Random) -> bytes:
    """Text with bytes lost, doubled, turned, or put in."""
    changed = bytearray(text)
    for _ in range(chance.choice([1, 1, 2, 5])):
        place = chance.randrange(len(changed) + 1)
        kind = chance.randrange(4)
        if kind == 0:
            del changed[place : place + chance.choice([1, 3, 40])]
        elif kind == 1:
            changed[place:place] = chance.choice(
                [b"\xff", b"\x00", b"[" * 5000, b"{" * 5000, b"9" * 5000, b"NaN", b'"', b",", b"\xed\xa0\x80", b"-"]
            )
        elif kind == 2 and place < len(changed):
            changed[place] ^= 1 << chance.randrange(8)
        else:
            changed[place:place] = changed[:place]
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


def _lie(header: dict[str, Any], body: bytes, chance: random.Random) -> tuple[str, bytes]:
    """One statement of the header that is not true."""
    name = chance.choice(sorted(header))
    entry, other = header[name], header[chance.choice(sorted(header))]
    begin, end = entry["data_offsets"]
    lies: dict[str, Callable[[], Any]] = {
        "dtype": lambda: entry.update(dtype=chance.choice(["F32", "F16", "I8", "F8_E4M3", "F4", "X", "", 5, None])),
        "shape": lambda: entry.update(
            shape=chance.choice([[], [0], [-1], [2**63], [2**32, 2**32], [1.5], "4", None, [[4]], [True], [10**30]])
        ),
        "same bytes, other shape": lambda: entry.update(shape=[math.prod(entry["shape"])]),
        "offsets": lambda: entry.update(
            data_offsets=chance.choice([[end, begin], [-1, end], [begin, 2**64], [begin], [], None, [0.5, end], "0"])
        ),
        "overlap": lambda: entry.update(data_offsets=list(other["data_offsets"])),
        "shifted": lambda: entry.update(data_offsets=[begin + 1, end + 1]),
        "beyond the file": lambda: entry.update(data_offsets=[begin, len(body) + chance.randrange(1, 1 << 40)]),
        "missing entry": lambda: header.pop(name),
        "missing field": lambda: entry.pop(chance.choice(sorted(entry))),
        "entry of another type": lambda: header.update({name: chance.choice([1, None, [], "x", True])}),
        "metadata": lambda: header.update(__metadata__=chance.choice([1, [], {"a": 1}, {"a": {"b": "c"}}, "x", None])),
        "one more": lambda: header.update({f"{name}2": dict(entry)}),
        "name": lambda: header.update({chance.choice(["", "\x00", "../x", "é" * 50, "a" * 5000]): header.pop(name)}),
    }
    what = chance.choice(sorted(lies))
    lies[what]()
    return f"{what} of {name}", _joined(header, body)


def _whole_header(chance: random.Random, body: bytes) -> tuple[str, bytes]:
    """A header that is none, or is far too much."""
    good = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    headers: dict[str, bytes] = {
        "no object": chance.choice([b"[]", b"null", b"1", b'"x"', b"", b" "]),
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
    what = chance.choice(sorted(headers))
    return what, _joined(headers[what], chance.choice([body, b"", b"\x01"]))


def damaged_safetensors(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    """What was done, and the bytes of a file with something wrong in it (or, seldom, with nothing)."""
    kind = chance.randrange(7)
    if kind == 0:
        cut = chance.randrange(len(data))
        return f"cut to {cut}", data[:cut]
    if kind == 1:
        changed = bytearray(data)
        limit = chance.choice([16, 200, len(data)])
        for _ in range(chance.choice([1, 1, 2, 8])):
            changed[chance.randrange(limit)] ^= 1 << chance.randrange(8)
        return f"bits of the first {limit} bytes", bytes(changed)
    if kind == 2:
        length = chance.choice(
            [0, 1, 7, len(data), len(data) - 8, 2**31, 2**32, 2**62, 2**64 - 1, chance.getrandbits(64)]
        )
        return f"header of {length}", length.to_bytes(8, "little") + data[8:]
    if kind == 3:
        return "more bytes", data + chance.randbytes(chance.choice([1, 8, 4096]))
    header, body = _split(data)
    header.pop("__metadata__", None)
    if kind in (4, 5):
        return _lie(header, body, chance)
    return _whole_header(chance, body)


def canary(folder: Path) -> bytes:
    """A pickle that makes a folder `canary` beside `folder` when it is opened."""
    return b"cos\nmkdir\n(S'" + os.fsencode(folder.parent / "canary") + b"'\ntR."


def pickled(folder: Path) -> bytes:
    """The same in a zip file, as torch.save writes it."""
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", canary(folder))
            archive.writestr("archive/version", "3\n")
        return file.getvalue()


def damage_safetensors(folder: Path, chance: random.Random) -> str:
    what, data = damaged_safetensors(_good_bytes(), chance)
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
    """Writes the good tensors into two files, and gives the index's map of them."""
    tensors = good_tensors()
    parts = (dict(list(tensors.items())[:3]), dict(list(tensors.items())[3:]))
    for shard, part in zip(SHARDS, parts, strict=True):
        safetensors.torch.save_file(part, folder / shard)
    return {name: shard for shard, part in zip(SHARDS, parts, strict=True) for name in part}


def damage_index(folder: Path, chance: random.Random) -> str:
    weight_map = put_shards(folder)
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "folder.safetensors").mkdir()
    (folder / "link.safetensors").symlink_to("/dev/zero")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    index: Any = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    name = chance.choice(sorted(weight_map))
    changes: dict[str, Callable[[], Any]] = {
        "name": lambda: weight_map.update({name: chance.choice(FOREIGN_NAMES)}),
        "other shard": lambda: weight_map.update({name: SHARDS[weight_map[name] == SHARDS[0]]}),
        "extra tensor": lambda: weight_map.update(extra=SHARDS[0]),
        "no map": lambda: index.update(weight_map=chance.choice([None, [], {}, 1, "x", [SHARDS[0]]])),
        "lost shard": lambda: (folder / chance.choice(SHARDS)).unlink(),
        "left out": lambda: weight_map.pop(name),
    }
    what = chance.choice([*sorted(changes), "bytes", "bytes"])
    if what in changes:
        changes[what]()
    text = json.dumps(index).encode()
    if what == "bytes":
        text = damaged_text(text, chance)
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


def _strange_base(chance: random.Random) -> bytes:
    """What an adapter was trained on, with one thing wrong in it."""
    sums: dict[str, Any] = {"layout": "0" * 64, "sample": "f" * 64, "packed": False}
    base: dict[str, Any] = {"version": 1, "model": {"model_type": "llama", "hidden_size": 6}, "weights": sums}
    if chance.random() < 0.5:
        return damaged_text(json.dumps(base).encode(), chance)
    place = chance.choice([base, base["model"], sums])
    place[chance.choice([*place, "more"])] = chance.choice([*STRANGE, nested(60)])
    return json.dumps(base).encode()


def damage_adapter(folder: Path, chance: random.Random) -> str:
    config, tensors = good_adapter()
    data = safetensors.torch.save(tensors)
    kind = chance.randrange(7)
    text: bytes | None = None
    if kind in (0, 1):
        option, value = chance.choice(OPTIONS), chance.choice([*STRANGE, nested(60)])
        config[option] = value
        what = f"{option} = {str(value)[:40]}"
    elif kind == 2:
        what, text = "config's bytes", damaged_text(json.dumps(config).encode(), chance)
    elif kind == 3:
        what, data = damaged_safetensors(data, chance)
    elif kind == 4:
        key = chance.choice(sorted(tensors))
        bad = tensors.pop(key)
        renamed = chance.choice([key + "x", "x" + key, key.replace("lora", "lora_embedding"), "", "first", key.upper()])
        tensors[renamed] = bad
        what, data = f"{key} as {renamed}", safetensors.torch.save(tensors)
    elif kind == 5:
        what = "the base's file"
        (folder / ADAPTER_BASE).write_bytes(_strange_base(chance))
    else:
        key = chance.choice(sorted(tensors))
        values = (
            tensors[key].T.contiguous(),
            tensors[key] * math.nan,
            tensors[key].int(),
            tensors[key][:1],
            torch.ones(()),
        )
        tensors[key] = chance.choice(values)
        what, data = f"values of {key}", safetensors.torch.save(tensors)
    (folder / ADAPTER_CONFIG).write_bytes(json.dumps(config).encode() if text is None else text)
    if chance.random() < 0.03:
        (folder / "adapter_model.bin").write_bytes(chance.choice([canary, pickled])(folder))
        return "a pickle"
    (folder / ADAPTER_TENSORS).write_bytes(data)
    return what


GOOD_RECORDS = (
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"prompt": "a", "completion": "b"},
    {"instruction": "a", "input": "", "output": "ü"},
    {"text": "plain"},
)


def damage_records(folder: Path, chance: random.Random) -> str:
    records = [json.loads(json.dumps(chance.choice(GOOD_RECORDS))) for _ in range(chance.randrange(1, 6))]
    kind = chance.randrange(4)
    if kind == 0:
        victim = chance.choice(records)
        victim[chance.choice(sorted(victim))] = chance.choice([*STRANGE, "\ud800", nested(40)])
    text = "\n".join(json.dumps(record, ensure_ascii=kind != 1) for record in records)
    encoding = chance.choice(["utf-8", "utf-16", "utf-32", "latin-1", "cp1252"]) if kind == 1 else "utf-8"
    data = text.encode(encoding)
    if kind == 2:
        data = damaged_text(data, chance)
    if kind == 3:
        data = chance.choice(
            [b"", b"\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf" + data, data + b"\r\n", b"[" * 100_000, b"\x00" * 50]
        )
    (folder / RECORDS).write_bytes(data)
    return f"{kind} in {encoding}"
