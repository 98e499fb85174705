"""What does torch do to a packed base when it shards it over processes (fully_shard, FSDP2), ours and bitsandbytes'?

    python profiling/sharded_base.py           # two processes over gloo, every case
    python profiling/sharded_base.py --tiny    # one process, two cases

For each base, the blocks of a small Llama are sharded without their adapters, and compared with the state before:

kept        share of the packed bytes that a process holds outside of forward and backward
shards      dtypes of the shards
bits        whether the gathered bytes equal the packed ones
gradients   largest difference of the adapters' gradients from those without sharding, and the largest gradient

`mixed` is FSDP's mixed precision: parameters are cast to that dtype when they are gathered, as with `accelerate launch
--mixed_precision`. At the end, one process takes a step while the other one asks it to stop, as after an error or a
signal; `one stops` holds the outcome in each. The last line is JSON with all of this.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from parts.example_models import make_tiny_model
from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized
from qlora_lite.quantization.packed_weight import PackedWeight
from qlora_lite.surgery import repeated_blocks

PROCESSES = 2
SECONDS = 10  # for which a process waits for others
Packed = Callable[[nn.Module], dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """A base. model: loads it with adapters. packed: returns its packed tensors by name. mixed: FSDP's param_dtype."""

    name: str
    model: Callable[[Path], nn.Module]
    packed: Packed
    mixed: torch.dtype | None = None


def _adapted(format: str, folder: Path) -> nn.Module:
    model = load_quantized(folder, QuantConfig(format=format), dtype=torch.float32)
    add_lora_(model, LoraConfig(rank=2, dropout=0.0, init_lora_weights="gaussian"))
    return model


def _as_parameters(format: str, folder: Path) -> nn.Module:
    """Loads our model with packed bytes and statistics as frozen parameters; the only scalar stays a buffer."""
    model = _adapted(format, folder)
    for weight in model.modules():
        if isinstance(weight, PackedWeight):
            for name in ("packed", "absmax", "nested_absmax"):
                if (buffer := weight._buffers.pop(name, None)) is not None:
                    weight.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
    return model


def _packed_weights(model: nn.Module) -> dict[str, Tensor]:
    blocks = enumerate(repeated_blocks(model))
    weights = [(f"{number}.{n}", m) for number, block in blocks for n, m in block.named_modules()]
    return {
        f"{name}.{part}": getattr(module, part)
        for name, module in weights
        if isinstance(module, PackedWeight)
        for part in ("packed", "absmax", "nested_absmax")
        if hasattr(module, part)
    }


def _theirs(storage: torch.dtype, folder: Path) -> nn.Module:
    """Loads the model of transformers, bitsandbytes and peft, with 4-bit codes stored in words of this dtype."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    packing = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=storage,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=packing, dtype=torch.float32)
    adapter = PeftConfig(r=2, lora_alpha=4, target_modules="all-linear", lora_dropout=0.0, init_lora_weights=False)
    return get_peft_model(model, adapter)  # type: ignore[no-any-return]


def _their_weights(model: nn.Module) -> dict[str, Tensor]:
    from bitsandbytes.nn import Linear4bit

    return {name: module.weight for name, module in model.named_modules() if isinstance(module, Linear4bit)}


CASES = (
    Case("ours nf4, as it is", functools.partial(_adapted, "nf4"), _packed_weights),
    Case("ours nf4, bytes as parameters", functools.partial(_as_parameters, "nf4"), _packed_weights),
    Case("ours int8, bytes as parameters", functools.partial(_as_parameters, "int8"), _packed_weights),
    Case(
        "ours nf4, bytes as parameters, mixed bfloat16",
        functools.partial(_as_parameters, "nf4"),
        _packed_weights,
        torch.bfloat16,
    ),
    *(
        Case(
            f"bitsandbytes, words of {str(storage)[6:]}{f', mixed {str(mixed)[6:]}' if mixed else ''}",
            functools.partial(_theirs, storage),
            _their_weights,
            mixed,
        )
        for storage in (torch.uint8, torch.bfloat16)
        for mixed in (None, torch.bfloat16, torch.float16)
    ),
)
TINY_CASES = CASES[:2]


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """Returns the gradients of a step in training mode. In eval mode, bitsandbytes re-packs its layers on a CPU."""
    ids = torch.randint(100, (2, 12), generator=torch.Generator().manual_seed(0))
    model.train().zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).clone()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shard(model: nn.Module, mixed: torch.dtype | None) -> list[nn.Module]:
    """Shards the blocks without their adapters, and returns the blocks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    adapters = {value for value in model.parameters() if value.requires_grad}
    blocks = repeated_blocks(model)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=mixed), ignored_params=adapters)
    return blocks


def seen(case: Case, folder: Path) -> dict[str, Any]:
    """Returns the figures of a case in this process."""
    torch.manual_seed(0)
    model = case.model(folder)
    wanted = _gradients(model)
    before = {name: _bytes(tensor) for name, tensor in case.packed(model).items()}
    blocks = _shard(model, case.mixed)
    held = {name: _local(tensor) for name, tensor in case.packed(model).items()}
    share = sum(tensor.nbytes for tensor in held.values()) / sum(tensor.numel() for tensor in before.values())
    for block in blocks:
        assert isinstance(block, FSDPModule)
        block.unshard()
    after = {name: _bytes(tensor) for name, tensor in case.packed(model).items()}
    equal = all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for block in blocks:
        block.reshard()
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in held.values()})
    facts = {"kept": round(share, 3), "shards": " ".join(dtypes), "bits": equal, "gradients": None}
    found = _gradients(model)
    difference = max(float((found[name] - gradient).abs().max()) for name, gradient in wanted.items())
    return facts | {"gradients": [difference, max(float(gradient.abs().max()) for gradient in wanted.values())]}


def seen_or_error(case: Case, folder: Path) -> dict[str, Any]:
    """Returns the figures of a case, or the error that torch or bitsandbytes raised."""
    try:
        return seen(case, folder)
    except Exception as error:  # any error of the libraries is a result of this script
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def one_stops(folder: Path) -> dict[str, Any]:
    """Returns the outcome in this process when the last one reduces three numbers and the others take a step."""
    model = _as_parameters("nf4", folder)
    _shard(model, None)
    asked = torch.tensor([1, 0, 0])
    try:
        if dist.get_rank() == dist.get_world_size() - 1:
            dist.all_reduce(asked)
            return {"asked, and was told": asked.tolist()}
        return {"stepped": len(_gradients(model))}
    except RuntimeError as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def _work(rank: int, count: int, port: int, names: list[str], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    dist.init_process_group("gloo", rank=rank, world_size=count, timeout=timedelta(seconds=SECONDS))
    found = {case.name: seen_or_error(case, folder) for case in CASES if case.name in names}
    if count > 1:
        found["one stops"] = one_stops(folder)
    (folder / f"seen-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="one process, two cases")
    tiny = parser.parse_args().tiny
    count = 1 if tiny else PROCESSES
    names = [case.name for case in (TINY_CASES if tiny else CASES)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_tiny_model(Path(scratch))
        torch.multiprocessing.spawn(_work, (count, _free_port(), names, folder), nprocs=count)
        found = json.loads((folder / "seen-0.json").read_text())
        if not tiny:
            last = json.loads((folder / f"seen-{count - 1}.json").read_text())
            found["one stops"] = {"it": last["one stops"], "the other": found["one stops"]}
    table = Table("base", "kept", "shards", "bits", "gradients")
    for name, facts in found.items():
        if name == "one stops":
            table.add_row(name, *[""] * 3, escape("; ".join(f"{who}: {what}" for who, what in facts.items())))
            continue
        if "error" in facts:
            table.add_row(name, *[""] * 3, escape(facts["error"]))
            continue
        difference, largest = facts["gradients"]
        bits = "equal" if facts["bits"] else "changed"
        table.add_row(name, f"{facts['kept']}", facts["shards"], bits, f"{difference:.1e} of {largest:.1e}")
    Console(width=140).print(table)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
