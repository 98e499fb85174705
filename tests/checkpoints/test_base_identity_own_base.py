"""A base that LoftQ packed anew: its error beside one iteration's and peft's, and that its adapter is kept to it."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lite import LoraConfig, QuantConfig, add_lora_, export_merged, load_adapter_, load_quantized, save_adapter
from qlora_lite.checkpoints.base_identity import digest_of, own_weights
from qlora_lite.cli.main import app
from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.export.merged import merge_checkpoint
from qlora_lite.export.quantized import save_quantized
from qlora_lite.lora.adapters import lora_layers, remove_lora_
from qlora_lite.lora.config import init_parts
from qlora_lite.lora.init import packed_anew
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.quantization.layers import QuantizedLinear
from qlora_lite.quantization.packed_weight import PackedWeight

TOKENS = torch.arange(12).view(2, 6)
TARGETS = ["q_proj", "down_proj"]


class Stored:
    """A weight as a checkpoint has it."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.shape = weight, weight.shape

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.weight[start:stop]


def error_of(weight: torch.Tensor, init: str, format: str = "nf4", double_quant: bool = True, **options: Any) -> float:
    """||W - Q - scaling B A||."""
    from qlora_lite.lora.init import start_

    base = QuantizedLinear(PackedWeight.of(weight, QuantConfig(format, double_quant=double_quant)))
    layer = LoraLayer(8, 16, base, dropout=0.0, **options)
    start_(layer, "layer", init, {"layer.weight": Stored(weight)})  # type: ignore[dict-item]
    return float((weight - layer.effective_weight(torch.float32)).norm())


@pytest.mark.parametrize(("format", "use_rslora"), [("nf4", False), ("fp4", True), ("int8", False)])
def test_iterations_leave_a_smaller_error(format: str, use_rslora: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 128)
    one, five = (error_of(weight, init, format, use_rslora=use_rslora) for init in ("loftq", "loftq:5"))
    assert five < one
    assert error_of(weight, "loftq:1", format, use_rslora=use_rslora) == one


def test_the_error_is_that_of_peft() -> None:
    from peft.utils import loftq_utils

    # It moves to an accelerator whether there is one or not.
    source = inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"')
    namespace = dict(vars(loftq_utils))
    exec(source, namespace)
    torch.manual_seed(0)
    weight = torch.randn(96, 128)
    for rounds in (1, 5):
        dequantized, lora_A, lora_B = namespace["loftq_init"](weight, num_bits=4, reduced_rank=8, num_iter=rounds)
        theirs = float((weight - dequantized - lora_B @ lora_A).norm())
        assert error_of(weight, f"loftq:{rounds}", double_quant=False) == pytest.approx(theirs, rel=1e-3)


def test_the_old_weight_is_left_as_it_was() -> None:
    old = PackedWeight.of(torch.randn(64, 64), QuantConfig())
    before = {name: buffer.clone() for name, buffer in old.state_dict().items()}
    new = packed_anew(old, torch.randn(64, 64), "layer.weight")
    assert (old.of_checkpoint, new.of_checkpoint) == (True, False)
    assert (new.format, new.blocksize, new.double_quant) == (old.format, old.blocksize, old.double_quant)
    assert all(torch.equal(buffer, before[name]) for name, buffer in old.state_dict().items())
    assert digest_of([("layer", new)]) != digest_of([("layer", old)]) != digest_of([("other", old)])


def test_an_adapter_comes_back_on_its_own_base_alone(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_quantized(tiny_folder, QuantConfig(), dtype=torch.float32)
    add_lora_(model, LoraConfig(4, 8, target_modules=TARGETS, init_lora_weights="loftq:3"))
    assert len(own_weights(model)) == len(lora_layers(model))
    expected = model(TOKENS).logits
    save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] is None
    merged = export_merged(model, tmp_path / "merged", torch.float32)
    with pytest.raises(CheckpointError, match="'original' has no meaning"):
        export_merged(model, tmp_path / "not", base="original")
    remove_lora_(model)
    save_quantized(model, tmp_path / "base")

    with pytest.raises(CheckpointError, match=r"packed anew, and the model has another; load the base that save_quan"):
        load_adapter_(load_quantized(tiny_folder, QuantConfig(), dtype=torch.float32), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="packed anew, and the model has another"):
        load_adapter_(load_quantized(tiny_folder, QuantConfig(format="none")), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"packed anew, which .* is not; load the base"):
        merge_checkpoint(tiny_folder, tmp_path / "adapter", tmp_path / "not")
    assert not (tmp_path / "not").exists()

    again = load_quantized(tmp_path / "base", dtype=torch.float32)
    load_adapter_(again, tmp_path / "adapter")
    assert torch.equal(again(TOKENS).logits, expected)
    save_adapter(again, tmp_path / "again")
    files = [tmp_path / name / "adapter_config.json" for name in ("adapter", "again")]
    assert files[0].read_text() == files[1].read_text()
    from_disk = merge_checkpoint(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "from_disk", dtype=torch.float32, load_dtype=torch.float32
    )
    written = [tmp_path / name / files.files[0] for name, files in (("merged", merged), ("from_disk", from_disk))]
    assert written[0].read_bytes() == written[1].read_bytes()


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")  # peft says that it passes over the digest
def test_peft_reads_the_pair(tiny_folder: Path, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    model = load_quantized(tiny_folder, QuantConfig(), dtype=torch.float32)
    add_lora_(model, LoraConfig(4, 8, target_modules=TARGETS, init_lora_weights="loftq:2"))
    expected = model(TOKENS).logits
    save_adapter(model, tmp_path / "adapter")
    remove_lora_(model)
    assert (model(TOKENS).logits - expected).abs().max() > 1e-3
    save_quantized(model, tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").train()  # eval mode would change the base
    torch.testing.assert_close(theirs(input_ids=TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_packed_anew_is_refused(tiny_folder: Path) -> None:
    assert (init_parts("loftq:12"), init_parts("pissa")) == (("loftq", 12), ("pissa", 1))
    for wrong in ("loftq:0", "loftq:", "pissa:2"):
        with pytest.raises(ConfigError, match=r"init must be one of .*or loftq:N; got"):
            LoraConfig(init_lora_weights=wrong)
    with pytest.raises(ConfigError, match="writes no base; use it from Python"):
        words = ["train", "--model", tiny_folder, "--data", tiny_folder / "data.jsonl", "--output", tiny_folder / "out"]
        app([*map(str, words), "--init-lora-weights", "loftq:2"], standalone_mode=False)
    model = load_quantized(tiny_folder, QuantConfig(embedding_format="int8"))
    with pytest.raises(ConfigError, match=r"lm_head shares its packed weight with another module"):
        add_lora_(model, LoraConfig(2, target_modules=["lm_head"], init_lora_weights="loftq:2"))
    assert not lora_layers(model) and not own_weights(model)
