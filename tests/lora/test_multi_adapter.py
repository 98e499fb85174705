"""Tests of several adapters on one base against peft, and of the values that switching must not change."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_lite import (
    LoraConfig,
    QuantConfig,
    TrainConfig,
    add_lora_,
    export_merged,
    load_adapter_,
    load_quantized,
    merge_lora_,
    quantize_base_,
    save_adapter,
    train,
    unmerge_lora_,
)
from qlora_lite.errors import CheckpointError, ConfigError, QuantizationError, TargetError
from qlora_lite.lora.adapters import adapter_parameters, adapters_disabled, inactive_adapters, lora_layers, remove_lora_
from qlora_lite.lora.multi_adapter import (
    active_adapter,
    adapter_names,
    add_adapter_,
    combine_adapters_,
    delete_adapter_,
    use_adapter_,
    using_adapter,
)

TOKENS = torch.arange(12).view(2, 6)
FIRST = LoraConfig(3, 7, target_modules=["q_proj", "v_proj", "embed_tokens"])
SECOND = LoraConfig(5, 2, target_modules=["q_proj", "down_proj"], rank_pattern={"layers.1.mlp.down_proj": 2})


@pytest.fixture(scope="module")
def folder(make_tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("small"), hidden=32)  # type: ignore[no-any-return]


def loaded(folder: Path, format: str = "none") -> Any:
    return load_quantized(folder, QuantConfig(format=format), dtype=torch.float32).eval()


def warm_(model: nn.Module) -> None:
    """Has the adapter in use do something."""
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_A, std=0.2)
        nn.init.normal_(layer.lora_B, std=0.2)


def with_two(folder: Path, format: str = "none") -> Any:
    """A model with the adapters first and second, of which second is in use."""
    model = loaded(folder, format)
    torch.manual_seed(1)
    for name, config in {"first": FIRST, "second": SECOND}.items():
        add_adapter_(model, name, config)
        warm_(model)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(TOKENS).logits
    return found


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def base_digest(model: nn.Module) -> dict[str, str]:
    """A hash of every stored byte that is no adapter's, by the name that it has without one."""
    return {
        name.replace(".base_layer", ""): hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
        .hexdigest()
        for name, tensor in model.state_dict().items()
        if "lora_" not in name
    }  # fmt: skip


@pytest.fixture
def both(folder: Path, tmp_path: Path) -> tuple[Any, Any]:
    """Ours and peft's model, each with both adapters under their names."""
    import peft
    from transformers import AutoModelForCausalLM

    ours = with_two(folder)
    for name in ("first", "second"):
        save_adapter(ours, tmp_path / name, name=name)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "first", adapter_name="first")
    theirs.load_adapter(tmp_path / "second", adapter_name="second")
    return ours, theirs.eval()


def test_switching_disabling_and_deleting_are_as_in_peft(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    seen = []
    for name in ("first", "second", "first"):
        use_adapter_(ours, name)
        theirs.set_adapter(name)
        close(logits(ours), logits(theirs))
        seen.append(logits(ours))
    assert (seen[0] - seen[1]).abs().max() > 0.01 and torch.equal(seen[0], seen[2])
    with adapters_disabled(ours), theirs.disable_adapter():
        close(logits(ours), logits(theirs))
    delete_adapter_(ours, "second")
    theirs.delete_adapter("second")
    close(logits(ours), logits(theirs))
    assert adapter_names(ours) == ["first"] == list(theirs.peft_config)


@pytest.mark.parametrize("rank", [None, 4])
def test_the_weighted_sum_is_pefts(both: tuple[Any, Any], rank: int | None) -> None:
    ours, theirs = both
    way = {"combination_type": "cat"} if rank is None else {"combination_type": "svd", "svd_rank": rank}
    theirs.add_weighted_adapter(["first", "second"], [0.7, 1.3], "sum", **way)
    theirs.set_adapter("sum")
    combine_adapters_(ours, {"first": 0.7, "second": 1.3}, "sum", rank)
    assert active_adapter(ours) == "sum" and adapter_names(ours) == ["first", "second", "sum"]
    close(logits(ours), logits(theirs))


def test_merging_one_or_all_is_as_in_peft(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    # peft merges an embedding's update into the weight that it shares with the head.
    head = theirs.base_model.model.lm_head
    head.weight = nn.Parameter(head.weight.detach().clone())
    one = copy.deepcopy(theirs).merge_and_unload(adapter_names=["first"])
    merge_lora_(ours, name="first")
    close(logits(ours), logits(one))
    unmerge_lora_(ours)
    combine_adapters_(ours, {"first": 1, "second": 1}, "sum")
    merge_lora_(ours)
    close(logits(ours), logits(theirs.merge_and_unload(adapter_names=["first", "second"])))


def test_a_sum_is_exact_for_pissa_rslora_and_16_bits(folder: Path) -> None:
    model = loaded(folder)
    settings = {
        "half": LoraConfig(3, 7, target_modules=["q_proj"], use_rslora=True, adapter_dtype=torch.bfloat16, dropout=0.3),
        "start": LoraConfig(2, 4, target_modules=["q_proj", "lm_head"], init_lora_weights="pissa"),
    }
    expected: dict[str, Tensor] = {}
    for weight, (name, config) in zip((-0.5, 3.0), settings.items(), strict=True):
        add_adapter_(model, name, config)
        warm_(model)
        for path, layer in lora_layers(model).items():
            expected[path] = expected.get(path, 0.0) + weight * layer.delta_weight()
    assert set(combine_adapters_(model, {"half": -0.5, "start": 3.0}, "sum")) == set(expected)
    for path, layer in lora_layers(model).items():
        torch.testing.assert_close(layer.delta_weight(), expected[path], rtol=1e-5, atol=1e-6)
        assert layer.lora_A.requires_grad and layer.scaling == 1


@pytest.mark.parametrize("format", ["none", "nf4"])
def test_no_byte_of_the_base_changes(folder: Path, tmp_path: Path, format: str) -> None:
    model = loaded(folder, format)
    digest, start = base_digest(model), logits(model)
    add_lora_(model, FIRST)
    warm_(model)
    save_adapter(model, tmp_path / "first")
    add_adapter_(model, "second", SECOND)
    warm_(model)
    second = logits(model)
    load_adapter_(model, tmp_path / "first", name="again")
    again = logits(model)
    combine_adapters_(model, {"again": 1.0, "second": 1.0}, "sum")
    export_merged(model, tmp_path / "merged", torch.float32, name="second")
    assert active_adapter(model) == "sum"
    merge_lora_(model, name="second")
    close(logits(model), second)
    unmerge_lora_(model)
    assert torch.equal(logits(model), second)
    close(logits(loaded(tmp_path / "merged")), second)
    use_adapter_(model, "default")
    assert torch.equal(logits(model), again)
    for name in ("sum", "second", "again", "default"):
        delete_adapter_(model, name)
    assert torch.equal(logits(model), start) and base_digest(model) == digest
    assert not lora_layers(model) and not hasattr(model, "inactive_adapters")


def test_state_dict_is_of_the_adapter_in_use_and_saving_of_any(folder: Path, tmp_path: Path) -> None:
    model, alone = with_two(folder), loaded(folder)
    add_lora_(alone, SECOND)
    assert model.state_dict().keys() == alone.state_dict().keys()
    assert set(adapter_parameters(model)) == {name for name, p in model.named_parameters() if p.requires_grad}
    merge_lora_(model)  # looking at another one needs no switch
    save_adapter(model, tmp_path / "first", name="first")
    load_adapter_(alone, tmp_path / "first", name="first")
    unmerge_lora_(model)
    use_adapter_(model, "first")
    assert torch.equal(logits(alone), logits(model))
    assert all(not hasattr(layer, "base_layer") for layer in inactive_adapters(model)["second"].values())


def test_training_moves_the_adapter_in_use_alone(folder: Path) -> None:
    model = with_two(folder, "nf4")
    use_adapter_(model, "first")
    held = inactive_adapters(model)["second"].values()
    before = [parameter.clone() for layer in held for parameter in layer.parameters()]
    old = {name: value.detach().clone() for name, value in adapter_parameters(model).items()}
    batch = {"input_ids": TOKENS, "labels": TOKENS}
    train(model, [batch], TrainConfig(steps=2, learning_rate=0.01), progress=False)
    assert all(not torch.equal(value, old[name]) for name, value in adapter_parameters(model).items())
    after = [parameter for layer in held for parameter in layer.parameters()]
    assert all(torch.equal(was, now) and now.grad is None for was, now in zip(before, after, strict=True))
    model.train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    trained = adapter_parameters(model)
    use_adapter_(model, "second")
    assert all(value.grad is None for value in trained.values()) and all(m.training for m in model.modules())
    use_adapter_(model, "first")
    assert all(value is trained[name] for name, value in adapter_parameters(model).items())


def test_within_a_block_and_after_a_failure_it_is_as_before(folder: Path, tmp_path: Path) -> None:
    model = with_two(folder)
    second = logits(model)
    with pytest.raises(KeyError), using_adapter(model, "first"):
        assert active_adapter(model) == "first"
        raise KeyError
    (tmp_path / "empty").mkdir()
    use_adapter_(model, "first")
    with torch.no_grad():
        next(iter(lora_layers(model).values())).lora_B.fill_(1e9)
    use_adapter_(model, "second")
    model.requires_grad_(False)
    attempts: list[tuple[type[Exception], Any]] = [
        (TargetError, lambda: add_adapter_(model, "third", LoraConfig(2, target_modules=["q_porj"]))),
        (TargetError, lambda: add_adapter_(model, "first", FIRST)),
        (TargetError, lambda: add_adapter_(model, "second", FIRST)),
        (TargetError, lambda: use_adapter_(model, "third")),
        (TargetError, lambda: delete_adapter_(model, "third")),
        (TargetError, lambda: save_adapter(model, tmp_path / "third", name="third")),
        (TargetError, lambda: combine_adapters_(model, {"first": 1.0, "third": 1.0}, "sum")),
        (ConfigError, lambda: combine_adapters_(model, {"first": float("nan")}, "sum")),
        (ConfigError, lambda: add_adapter_(model, "a.b", FIRST)),
        (CheckpointError, lambda: load_adapter_(model, tmp_path / "empty", name="third")),
        (QuantizationError, lambda: merge_lora_(model, torch.float16, name="first")),
    ]
    for error, attempt in attempts:
        with pytest.raises(error):
            attempt()
        assert (active_adapter(model), adapter_names(model)) == ("second", ["first", "second"])
        assert torch.equal(logits(model), second)
    model.model.layers[1].self_attn.v_proj = nn.Linear(8, 8)
    with pytest.raises(
        TargetError, match=r"'first' no longer fits the model, in which were replaced: .*1\.self_attn\.v_proj"
    ):
        use_adapter_(model, "first")
    assert active_adapter(model) == "second" and len(lora_layers(model)) == 4


def test_a_base_may_be_packed_between_switches_and_a_shared_layer_is_one() -> None:
    shared, x = nn.Linear(64, 64), torch.randn(3, 64)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(64, 64))
    add_adapter_(model, "first", LoraConfig(2, target_modules=["0"]))
    warm_(model)
    first = next(iter(lora_layers(model).values()))
    add_adapter_(model, "second", LoraConfig(2, target_modules=["0", "3"]))
    quantize_base_(model, QuantConfig(skip_modules=()))
    packed = model[0].base_layer
    assert packed is not shared and packed is model[2].base_layer
    use_adapter_(model, "first")
    assert model[0] is model[2] is first and first.base_layer is packed and model[3](x).shape == x.shape
    torch.testing.assert_close(first(x), packed(x) + first.scaling * x @ first.lora_A.T @ first.lora_B.T)
    use_adapter_(model, None)
    assert model[0] is model[2] is packed


def test_nothing_moves_while_layers_are_merged_or_off(folder: Path) -> None:
    model = with_two(folder)
    merge_lora_(model)
    merged = logits(model)
    for change in (
        lambda: use_adapter_(model, "first"),
        lambda: use_adapter_(model, None),
        lambda: delete_adapter_(model, "second"),
        lambda: add_adapter_(model, "third", FIRST),
        lambda: combine_adapters_(model, {"first": 1.0}, "third"),
        lambda: merge_lora_(model, name="first"),
    ):
        with pytest.raises(ConfigError, match=r"layers are merged, .*; call unmerge_lora_ before"):
            change()
    assert torch.equal(logits(model), merged)
    unmerge_lora_(model)
    with adapters_disabled(model), pytest.raises(ConfigError, match="switched off"):
        use_adapter_(model, "first")


def test_the_unnamed_one_is_called_default_and_is_not_doubled(folder: Path, tmp_path: Path) -> None:
    model = loaded(folder)
    assert active_adapter(model) is None and adapter_names(model) == []
    add_lora_(model, FIRST)
    save_adapter(model, tmp_path / "first")
    assert active_adapter(model) == "default"
    with pytest.raises(TargetError, match="have adapters already"):
        add_lora_(model, SECOND)
    use_adapter_(model, None)
    for again in (lambda: add_lora_(model, SECOND), lambda: load_adapter_(model, tmp_path / "first")):
        with pytest.raises(TargetError, match="has an adapter named 'default' already"):
            again()
    with pytest.raises(TargetError, match="none in use"):
        merge_lora_(model)
    add_adapter_(model, "dora", LoraConfig(2, target_modules=["q_proj"], variant="dora"))
    with pytest.raises(ConfigError, match="'dora' is of variant dora"):
        combine_adapters_(model, {"dora": 1.0}, "sum")
    remove_lora_(model)
    assert adapter_names(model) == []


def test_what_is_trained_whole_is_not_left_behind_silently() -> None:
    model = torch.nn.ModuleDict({"first": torch.nn.Linear(4, 4), "norm": torch.nn.LayerNorm(4)})
    add_lora_(model, LoraConfig(rank=2, target_modules=["first"], modules_to_save=["norm"]))
    with pytest.raises(ConfigError, match=r"norm: an adapter with modules_to_save.* cannot be switched away from"):
        use_adapter_(model, None)
    with pytest.raises(ConfigError, match="cannot be switched away from"):
        add_adapter_(model, "second", LoraConfig(rank=2, target_modules=["first"]))
    assert active_adapter(model) == "default" and adapter_names(model) == ["default"]
    biased = torch.nn.ModuleDict({"first": torch.nn.Linear(4, 4)})
    add_lora_(biased, LoraConfig(rank=2, target_modules=["first"], bias="lora_only"))
    with pytest.raises(ConfigError, match="has trained biases, which cannot be summed"):
        combine_adapters_(biased, {"default": 1.0}, "sum")


def packed_and_adapted(format: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).eval()
    quantize_base_(model, QuantConfig(format=format))
    add_lora_(model, LoraConfig(rank=4))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    return model


@pytest.mark.parametrize("format", ["none", "nf4", "fp4", "int8"])
def test_merged_equals_unmerged(format: str) -> None:
    model, x = packed_and_adapted(format), torch.randn(8, 64)
    before = model(x)
    merge_lora_(model)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    unmerge_lora_(model)
    assert torch.equal(model(x), before)


def test_overflow_names_the_layer_and_merges_none() -> None:
    model = packed_and_adapted("nf4")
    with torch.no_grad():
        model[2].lora_B.fill_(1e7)
    with pytest.raises(QuantizationError, match=r"2\.weight reaches .* use bfloat16"):
        merge_lora_(model, torch.float16)
    assert not any(layer.merged for layer in lora_layers(model).values())


def test_without_adapters_there_is_nothing_to_merge() -> None:
    with pytest.raises(TargetError, match="no adapters"):
        merge_lora_(nn.Sequential(nn.Linear(2, 2)))
