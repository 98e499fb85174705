"""Tests of adapted convolutions against torch with a merged kernel, against peft, and through files and exports."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from qlora_lite import (
    LoraConfig,
    LoraLayer,
    QuantConfig,
    add_lora_,
    export_merged,
    load_adapter_,
    load_quantized,
    merge_lora_,
    save_adapter,
    unmerge_lora_,
)
from qlora_lite.data.encoding import TokenizedExample
from qlora_lite.errors import CheckpointError, InputError, TargetError
from qlora_lite.export.merged import merge_checkpoint
from qlora_lite.lora.adapters import adapters_disabled, lora_layers
from qlora_lite.lora.convolution import refusal_reason
from qlora_lite.lora.targets import select_targets
from qlora_lite.weight_readers import described_reads

KINDS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def names_of(model: nn.Module, targets: Any) -> list[str]:
    """Names of the layers that these target_modules mean."""
    return [layer.name for layer in select_targets(model, LoraConfig(target_modules=targets))]


def warm_(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """Adapters that do something; magnitudes that are not the norms."""
    torch.manual_seed(7)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_A, std=scale)
        nn.init.normal_(layer.lora_B, std=scale)
        if layer.variant.name == "dora":
            with torch.no_grad():
                layer.lora_magnitude.mul_(torch.rand_like(layer.lora_magnitude) + 0.5)
    return model


def kernel_of(layer: LoraLayer) -> Tensor:
    """K + scaling B A, or DoRA's m (K + scaling B A) / n with n held fast, with gradients to A, B and m."""
    base: Any = layer.base_layer
    total = base.weight.flatten(1) + layer.scaling * layer.lora_B @ layer.lora_A
    if layer.variant.name == "dora":
        total = total * (layer.lora_magnitude / total.detach().norm(dim=1))[:, None]
    return total.view(base.weight.shape)


@st.composite
def convolutions(draw: Any) -> tuple[Any, Tensor, dict[str, Any]]:
    places = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 3]))
    mode = draw(st.sampled_from(["zeros", "zeros", "circular", "reflect", "replicate"]))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(places))
    padding = draw(st.sampled_from(["same", "valid", 0, 1, 2]))
    stride = 1 if padding == "same" else draw(st.integers(1, 3))
    options = {
        "padding": padding,
        "stride": stride,
        "dilation": draw(st.integers(1, 2)),
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": mode if places < 3 or mode != "reflect" else "zeros",
    }
    torch.manual_seed(draw(st.integers(0, 99)))
    base = KINDS[places - 1](2 * groups, draw(st.integers(1, 2)) * groups, kernel, **options)
    batch = draw(st.sampled_from([(), (2,)]))
    adapter = {"variant": draw(st.sampled_from(["lora", "dora"])), "use_rslora": draw(st.booleans())}
    return base, torch.randn(*batch, 2 * groups, *(draw(st.integers(5, 7)) for _ in range(places))), adapter


@settings(max_examples=15, deadline=None)
@given(convolutions())
def test_output_and_gradients_are_those_of_a_convolution_with_the_merged_kernel(
    case: tuple[Any, Tensor, dict[str, Any]],
) -> None:
    base, x, adapter = case
    layer = LoraLayer(2, 3.0, base, dropout=0.0, **adapter)
    torch.testing.assert_close(layer(x), base(x), rtol=1e-5, atol=1e-6)  # B is zero
    warm_(layer)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    x.requires_grad_()
    probe = torch.randn_like(base(x))
    wanted = base._conv_forward(x, kernel_of(layer), base.bias)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad((layer(x) * probe).sum(), [x, *trained])
    theirs = torch.autograd.grad((wanted * probe).sum(), [x, *trained])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(base.weight + layer.delta_weight(), kernel_of(layer))
    layer.merge_weights()
    assert layer.weight.shape == base.weight.shape and layer.stride == base.stride
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
    layer.adapter_enabled = False
    assert torch.equal(layer(x), base(x))


def test_kernels_with_channels_last_are_merged_too() -> None:
    layer = LoraLayer(2, 3.0, nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), dropout=0.0, variant="dora")
    warm_(layer)
    assert not layer.base_layer.weight.is_contiguous()  # type: ignore[operator]
    torch.testing.assert_close(layer.effective_weight(torch.float32), kernel_of(layer))


def test_sixteen_bits_in_and_out_with_adapters_in_fp32() -> None:
    layer = warm_(LoraLayer(2, 3.0, nn.Conv1d(4, 6, 3), dropout=0.0))
    x = torch.randn(2, 4, 9)
    exact = layer(x)
    half = layer.bfloat16()
    half.lora_A.data, half.lora_B.data = half.lora_A.data.float(), half.lora_B.data.float()
    y = half(x.bfloat16())
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and half.lora_A.grad.dtype == half.lora_B.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert half(x).dtype == torch.bfloat16


def test_dropout_acts_on_the_input_of_a_while_training() -> None:
    base = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")
    layer = warm_(LoraLayer(2, 2.0, base, dropout=0.5))
    x = torch.randn(2, 2, 5, 5)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    update = layer.delta_weight()
    torch.testing.assert_close(y, base(x) + base._conv_forward(dropped, update, None), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.eval()(x), base._conv_forward(x, base.weight + update, base.bias))


class Net(nn.Module):
    """Convolutions of every dimension beside a linear layer."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.flat = nn.Conv1d(4, 8, 3, stride=2, padding=1, groups=groups)
        self.plane = nn.Conv2d(1, 4, (3, 2), padding="same", bias=False)
        self.space = nn.Conv3d(2, 4, 3, padding=1)
        self.point = nn.Conv2d(4, 4, 1)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.plane(self.flat(x)[:, None]))
        x = self.space(x.view(-1, 2, 2, 8, x.shape[-1]))
        return self.out(x.mean(dim=(1, 2)).transpose(-1, -2))


ALL = ["flat", "plane", "space", "point", "out"]
X = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"plane": 2}, "alpha_pattern": {"space": 7}},
        {"use_rslora": True},
        {"variant": "dora"},
    ],
)
def test_peft_reads_our_files_and_merges_to_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    import peft

    ours = Net()
    add_lora_(ours, LoraConfig(rank=3, alpha=5, target_modules=ALL, **options))
    warm_(ours)
    save_adapter(ours, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "a"))
    torch.testing.assert_close(ours(X), theirs(X), rtol=1e-5, atol=1e-6)
    merged = theirs.merge_and_unload()
    for name in ALL:
        ours_merged = lora_layers(ours)[name].effective_weight(torch.float32)
        torch.testing.assert_close(ours_merged, merged.get_submodule(name).weight, rtol=0, atol=1e-6)
    bare = ours(X)
    merge_lora_(ours)
    torch.testing.assert_close(ours(X), bare, rtol=1e-5, atol=1e-5)
    with adapters_disabled(ours):
        assert torch.equal(ours(X), Net()(X))
    unmerge_lora_(ours)
    assert torch.equal(ours(X), bare)


@pytest.mark.parametrize("use_dora", [False, True])
def test_we_read_pefts_files(tmp_path: Path, use_dora: bool) -> None:
    import peft

    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=ALL, use_dora=use_dora, init_lora_weights=False)
    torch.manual_seed(2)
    theirs = peft.get_peft_model(Net(), config)
    theirs.save_pretrained(str(tmp_path / "a"))
    ours = Net()
    for _ in range(2):  # onto a plain model, and onto one that is adapted already
        assert load_adapter_(ours, tmp_path / "a") == ALL
        torch.testing.assert_close(ours.eval()(X), theirs.eval()(X), rtol=1e-5, atol=1e-6)
        for layer in lora_layers(ours).values():
            layer.reset_parameters()


@pytest.mark.parametrize("options", [{"padding_mode": "circular", "padding": 1}, {"dilation": 2, "padding": "same"}])
def test_options_that_peft_drops_from_a_are_right_in_its_merge_alone(tmp_path: Path, options: dict[str, Any]) -> None:
    import peft

    base = nn.Sequential(nn.Conv1d(4, 4, 3, **options))
    ours = copy.deepcopy(base)
    add_lora_(ours, LoraConfig(rank=2, target_modules=["0"]))
    warm_(ours)
    save_adapter(ours, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "a"))
    assert not torch.allclose(theirs(X), ours(X), atol=0.1)
    torch.testing.assert_close(theirs.merge_and_unload()(X), ours(X), rtol=1e-5, atol=1e-5)


def test_grouped_adapters_go_through_our_files_and_no_others(tmp_path: Path) -> None:
    import peft

    ours = Net(groups=2)
    add_lora_(ours, LoraConfig(rank=2, target_modules=["flat"]))
    warm_(ours)
    save_adapter(ours, tmp_path / "ours")
    again = Net(groups=2)
    load_adapter_(again, tmp_path / "ours")
    assert torch.equal(again(X), ours(X))
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(Net(groups=2), str(tmp_path / "ours"))
    theirs = peft.get_peft_model(Net(groups=2), peft.LoraConfig(r=2, target_modules=["flat"]))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    with pytest.raises(CheckpointError, match="reads the inputs of all groups, as peft's does, is not an update"):
        load_adapter_(Net(groups=2), tmp_path / "theirs")


@pytest.mark.parametrize(("init", "spread"), [("normal", 0.02), ("kaiming", 1 / math.sqrt(3 * 80)), ("gaussian", 0.5)])
def test_starts(init: str, spread: float) -> None:
    model = nn.Sequential(nn.Conv1d(16, 8, 5))
    add_lora_(model, LoraConfig(rank=2, target_modules=["0"], init_lora_weights=init))
    layer = lora_layers(model)["0"]
    assert float(layer.lora_A.detach().std()) == pytest.approx(spread, rel=0.25) and not layer.lora_B.any()
    for other in ("orthogonal", "pissa", "loftq"):
        with pytest.raises(TargetError, match=f"{other}' is for linear layers; 0 is a convolution"):
            add_lora_(
                nn.Sequential(nn.Conv1d(16, 8, 5)), LoraConfig(rank=2, target_modules=["0"], init_lora_weights=other)
            )


class OwnForward(nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class OwnConvolution(nn.Conv1d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input.flip(-1), weight, bias)


REFUSED = [
    (nn.ConvTranspose2d(2, 2, 2), "a ConvTranspose2d cannot be adapted: transposed convolutions are not supported"),
    (OwnForward(2, 2, 2), "a OwnForward cannot be adapted: it has its own forward"),
    (OwnConvolution(2, 2, 2), "a OwnConvolution cannot be adapted: it has its own forward"),
    (nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 2)), "each call makes its kernel of other parameters"),
    (nn.LazyConv1d(2, 2), "no kernel before its first call"),
]


@pytest.mark.parametrize(("module", "message"), REFUSED)
def test_what_cannot_be_adapted_is_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        LoraLayer(2, 2, module)
    model = nn.ModuleDict({"odd": module, "even": nn.Conv1d(2, 2, 2)})
    for targets in (["odd", "even"], "odd|even"):
        with pytest.raises(TargetError, match=f"odd: .*{message}.*; leave them out of target_modules"):
            add_lora_(model, LoraConfig(target_modules=targets))
    assert names_of(model, ["even"]) == ["even"]
    assert refusal_reason(nn.Linear(2, 2)) is None


class Reader(nn.Module):
    """Reads one kernel, calls the other and only asks for its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Conv1d(2, 2, 2), nn.Conv1d(2, 2, 2)
        nn.init.zeros_(self.called.weight)

    def forward(self, x: Tensor) -> Tensor:
        steps = [F.conv1d(x, self.read.weight) for _ in range(1)]
        return steps[0] + self.called(x.to(self.called.weight.dtype))


def test_kernels_that_the_parent_reads_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(Reader())
    assert add_lora_(copy.deepcopy(model), LoraConfig(target_modules=["called"])) == ["0.called"]
    with pytest.raises(TargetError, match=r"0\.read: Reader\.forward reads its weight instead of calling it"):
        add_lora_(model, LoraConfig(target_modules=["called", "read"]))
    other = nn.Sequential(nn.ModuleDict({"read": nn.Conv1d(2, 2, 2)}))
    add_lora_(other, LoraConfig(target_modules=["read"]))
    save_adapter(other, tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"Reader\.forward reads its weight"):
        load_adapter_(model, tmp_path / "a")


def test_mambas_convolution_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1)
    model = MambaForCausalLM(config)
    (name,) = [name for name, module in model.named_modules() if isinstance(module, nn.Conv1d)]
    assert len(described_reads(model, [name])) == 1
    with pytest.raises(TargetError, match=r"MambaMixer\..* reads its weight"):
        add_lora_(model, LoraConfig(target_modules=["conv1d"]))


def test_targets_name_match_or_choose_convolutions_but_all_linear_does_not() -> None:
    assert names_of(Net(), "all-linear") == ["out"]
    assert names_of(Net(), ".*(flat|space)") == ["flat", "space"]
    assert names_of(Net(), lambda name, module: isinstance(module, nn.Conv2d)) == [
        "plane",
        "point",
    ]


@pytest.mark.parametrize("x", [torch.zeros(2, 3, 9), torch.zeros(2, 2, 4, 9), torch.zeros(4, 9).long(), 5])
def test_wrong_inputs_are_told(x: Any) -> None:
    with pytest.raises(InputError, match="takes floats with 4 channels and 1 dimensions of space; got"):
        LoraLayer(2, 2, nn.Conv1d(4, 2, 3))(x)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal LM that sees pictures through a Conv2d."""
    from transformers import GitConfig, GitForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    vision = {**sizes, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    config = GitConfig(
        vision_config=vision,
        **sizes,
        vocab_size=64,
        num_hidden_layers=1,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    target = tmp_path_factory.mktemp("git")
    GitForCausalLM(config).save_pretrained(target)
    return target


def stored_kernel(folder: Path, name: str) -> Tensor:
    return load_file(folder / "model.safetensors")[f"{name}.weight"]


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_packed_model_with_an_adapted_convolution_is_exported(folder: Path, tmp_path: Path, variant: str) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = load_quantized(folder, QuantConfig(format="nf4"), dtype=torch.float32).eval()
    kernels = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert torch.equal(model.get_submodule(kernels[0]).weight, stored_kernel(folder, kernels[0]))
    targets = ["patch_embedding", "query"]
    names = add_lora_(model, LoraConfig(rank=2, target_modules=targets, variant=variant))
    warm_(model)
    assert names[0] == kernels[0]
    examples = [TokenizedExample([1, 5, 6, 7], [-100, 5, 6, 7])]
    verify = examples if variant == "lora" else None
    done = export_merged(model, tmp_path / "memory", torch.float32, verify=verify)
    assert (done.verification is None) == (verify is None)
    figures = {row["name"]: row for row in json.loads((tmp_path / "memory/merge_report.json").read_text())["tensors"]}
    update = lora_layers(model)[names[0]].delta_weight()
    assert figures[f"{names[0]}.weight"]["update_norm"] == pytest.approx(float(update.norm()), rel=1e-4)
    inputs = {"input_ids": torch.tensor([[1, 5, 6]]), "pixel_values": torch.randn(1, 3, 8, 8)}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "memory").eval()
    torch.testing.assert_close(plain(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)
    save_adapter(model, tmp_path / "adapter")
    options: dict[str, Any] = {"dtype": torch.float32, "load_dtype": torch.float32}
    merge_checkpoint(folder, tmp_path / "adapter", tmp_path / "disk", QuantConfig(format="nf4"), **options)
    (file,) = done.files
    on_disk, in_memory = (load_file(tmp_path / place / file) for place in ("disk", "memory"))
    assert on_disk.keys() == in_memory.keys()
    assert all(torch.equal(tensor, in_memory[name]) for name, tensor in on_disk.items())
