"""Tests of the order of blocks: exact events, and that no weight of a block is read while the block is away."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from qlora_lite import LoraConfig, QuantConfig, TrainConfig, add_lora_, load_quantized, train
from qlora_lite.lora.adapters import adapter_parameters
from qlora_lite.offload.block_order import followed_blocks
from qlora_lite.quantization.packed_weight import PackedWeight
from qlora_lite.surgery import repeated_blocks
from qlora_lite.training.forward.activation_checkpointing import BlockCheckpointing, checkpointed
from qlora_lite.training.forward.fuse import fuse_
from qlora_lite.training.forward.fused_forward import fused

LAYERS = 3


class Recorder:
    """A source that notes its calls, and which block is there."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.here: int | None = None

    def arrive(self, block: int) -> None:
        assert self.here is None
        self.here = block
        self.calls.append(f"arrive {block}")

    def next(self, block: int) -> None:
        self.calls.append(f"next {block}")

    def leave(self, block: int) -> None:
        assert self.here == block
        self.here = None
        self.calls.append(f"leave {block}")


def one_pass(*blocks: int, ahead: int, last: int) -> list[str]:
    """The calls of a pass over these blocks, the last one without a block ahead."""
    calls = []
    for block in blocks:
        calls += [f"arrive {block}", *([f"next {block + ahead}"] * (block != last)), f"leave {block}"]
    return calls


FORWARD = one_pass(0, 1, 2, ahead=1, last=2)
BACKWARD = one_pass(2, 1, 0, ahead=-1, last=0)


@pytest.fixture(scope="module")
def model(make_tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = make_tiny_model(tmp_path_factory.mktemp("three"), layers=LAYERS)
    loaded = load_quantized(folder, QuantConfig(), dtype=torch.float32)
    add_lora_(loaded, LoraConfig(rank=2))
    return loaded.train()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(100, (2, 8))


@contextmanager
def recorded(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Follows a model with a recorder, and asserts that packed weights are read in their block's time alone."""
    source, unpack = Recorder(), PackedWeight.dequantize_rows
    block_of = {id(part): number for number, block in enumerate(repeated_blocks(model)) for part in block.modules()}

    def read(self: PackedWeight, *given: Any) -> torch.Tensor:
        assert block_of.get(id(self), source.here) == source.here
        return unpack(self, *given)

    with monkeypatch.context() as patches, followed_blocks(model, source):
        patches.setattr(PackedWeight, "dequantize_rows", read)
        yield source


def attention_kept(decider: BlockCheckpointing) -> None:
    decider.kept, decider.attention_kept = 1, 1


SETTINGS = {
    "none": ("none", lambda decider: None),
    "full": ("full", lambda decider: None),
    "attention kept": ("full", attention_kept),
}


@pytest.mark.parametrize("lean", [False, True], ids=["own forward", "fused"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_goes_through_the_blocks_and_back(
    model: Any, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch, setting: str, lean: bool
) -> None:
    kind, choose = SETTINGS[setting]
    leaner = fused(model) if lean else nullcontext()
    with recorded(model, monkeypatch) as source, leaner, checkpointed(model, kind) as decider:
        choose(decider)
        for _ in range(2):  # batches whose gradients are summed
            loss = model(tokens, labels=tokens, use_cache=False).loss
            assert source.calls == FORWARD
            loss.backward()
            assert source.calls == FORWARD + BACKWARD
            source.calls.clear()


def test_the_gradients_are_the_same(model: Any, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in adapter_parameters(model).values()]

    with checkpointed(model, "full"):
        before = gradients()
        with recorded(model, monkeypatch):
            followed = gradients()
    assert all(map(torch.equal, before, followed))
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in repeated_blocks(model))


def as_passes(calls: list[str]) -> list[str]:
    """Divides calls into whole passes; fails if there is anything else between them."""
    found, rest = [], list(calls)
    while rest:
        name = next(name for name, whole in (("f", FORWARD), ("b", BACKWARD)) if rest[: len(whole)] == whole)
        found.append(name)
        rest = rest[len(FORWARD) :]
    return found


@pytest.mark.parametrize("checkpointing", ["none", "full", 1 << 20])
def test_training_with_accumulation_and_evaluation(
    model: Any, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch, checkpointing: str | int
) -> None:
    batch = {"input_ids": tokens, "labels": tokens}
    config = TrainConfig(steps=2, gradient_accumulation=2, checkpointing=checkpointing, eval_steps=1)
    with recorded(model, monkeypatch) as source:
        train(model, itertools.repeat(batch), config, eval_batches=[batch], progress=False)
    passes = "".join(as_passes(source.calls))
    # Checks before the first step, one with a gradient; two steps of two batches, and an evaluation after each.
    assert re.fullmatch("f*fb(fbfbf+){2}", passes), passes


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_other_loops(
    make_tiny_model: Callable[..., Path],
    tmp_path: Path,
    tokens: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    checkpointing: str,
) -> None:
    own = load_quantized(make_tiny_model(tmp_path, layers=LAYERS), QuantConfig())
    add_lora_(own, LoraConfig(rank=2))
    fuse_(own.train(), checkpointing)
    own(input_ids=tokens, labels=tokens)  # the first call tries the loss
    with recorded(own, monkeypatch) as source:
        own(input_ids=tokens, labels=tokens).loss.backward()
    assert source.calls == FORWARD + BACKWARD


def test_modules_that_another_library_recomputes_whole(
    model: Any, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(LAYERS)])
    held = torch.nn.Sequential()
    held.append(blocks)
    source = Recorder()
    with followed_blocks(held, source):
        x = torch.ones(2, 4)
        for block in blocks:  # calls the module again in backward, hooks included
            x = checkpoint(block, x, use_reentrant=False)
        x.sum().backward()
    assert source.calls == FORWARD + BACKWARD


def test_generation_with_a_cache_and_evaluation_go_forward_only(
    model: Any, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recorded(model, monkeypatch) as source, torch.no_grad():
        model.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert as_passes(source.calls) == ["f"] * 4
    with recorded(model, monkeypatch) as source, torch.inference_mode():
        model(tokens)
    assert source.calls == FORWARD


def test_blocks_without_a_gradient_do_not_arrive_in_backward(
    make_tiny_model: Callable[..., Path], tmp_path: Path, tokens: torch.Tensor
) -> None:
    own = load_quantized(make_tiny_model(tmp_path, layers=LAYERS), QuantConfig())
    add_lora_(own, LoraConfig(rank=2, layers_to_transform=[2]))
    source = Recorder()
    with followed_blocks(own, source):
        own(tokens, labels=tokens, use_cache=False).loss.backward()
    assert source.calls == [*FORWARD, *one_pass(2, ahead=-1, last=0)]


def test_errors_leave_no_block_behind(model: Any, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Recorder()
    middle = repeated_blocks(model)[1]

    def fail(*given: object, **options: object) -> None:
        raise ValueError("stop")

    with followed_blocks(model, source):
        with monkeypatch.context() as patches:
            patches.setattr(middle.mlp, "forward", fail)
            with pytest.raises(ValueError, match="stop"):
                model(tokens)
        assert source.calls[-2:] == ["next 2", "leave 1"] and source.here is None
        output = model(tokens, labels=tokens, use_cache=False)
        source.calls.clear()
        with monkeypatch.context() as patches:
            patches.setattr(torch.Tensor, "addmm_", fail)
            with pytest.raises(ValueError, match="stop"):
                output.loss.backward()
        assert source.here is not None  # a pass that broke off
        model(tokens)
    assert as_passes(source.calls[-len(FORWARD) :]) == ["f"] and source.here is None
