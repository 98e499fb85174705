"""Tests of the record of the base that an adapter was trained on, bases that LoftQ packed among them."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lite import (
    LoraConfig,
    QuantConfig,
    add_lora_,
    export_merged,
    load_adapter_,
    load_quantized,
    quantize_base_,
    save_adapter,
)
from qlora_lite.checkpoints import base_identity as module
from qlora_lite.checkpoints.base_identity import (
    BASE_FILE,
    check_trained_on_checkpoint,
    model_identity,
    packed_weights_hash,
    read_base_identity,
    repacked_weights,
)
from qlora_lite.checkpoints.safetensors_read import StoredTensor
from qlora_lite.cli.main import app, main
from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.export.merged import merge_checkpoint
from qlora_lite.export.quantized import save_quantized
from qlora_lite.lora.adapters import lora_layers, remove_lora_
from qlora_lite.lora.config import parse_init
from qlora_lite.lora.init import repacked
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.quantization.layers import QuantizedLinear
from qlora_lite.quantization.packed_weight import PackedWeight

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def adapter(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained (as far as files tell) on the tiny model in NF4."""
    model = load_quantized(tiny_folder)
    add_lora_(model, LoraConfig(2, 4, target_modules=TARGETS))
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    save_adapter(model, folder)
    return folder


@pytest.fixture
def changed(tiny_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """(what to do with the tensors) -> a copy of the tiny model."""

    def make(change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(tiny_folder, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def test_copies_formats_and_shards_are_the_same_base(tiny_folder: Path, adapter: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny_folder)
    plain.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    plain.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    save_quantized(load_quantized(tiny_folder, QuantConfig("int8")), tmp_path / "int8")
    save_quantized(load_quantized(tmp_path / "int8"), tmp_path / "again")
    for folder in (tiny_folder, *(tmp_path / name for name in ("shards", "bf16", "int8", "again"))):
        assert check_trained_on_checkpoint(adapter, folder) == ["sizes", "weights"], folder
    for folder, format in ((tiny_folder, "none"), (tmp_path / "shards", "nf4"), (tmp_path / "int8", "int8")):
        load_adapter_(load_quantized(folder, QuantConfig(format)), adapter)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_folder)
    quantize_base_(theirs, QuantConfig())
    load_adapter_(theirs, adapter)
    save_adapter(theirs, tmp_path / "theirs")
    assert (tmp_path / "theirs" / BASE_FILE).read_text() == (adapter / BASE_FILE).read_text()


def moved_a_bit(tensors: dict[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        tensor.mul_(1.001)


def one_tensor(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"].normal_(std=0.02)


@pytest.mark.parametrize("change", [moved_a_bit, one_tensor])
def test_another_revision_is_told_before_weights_are_read(
    change: Callable[..., None],
    changed: Callable[..., Path],
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = changed(change)
    model = load_quantized(folder, QuantConfig("none"))
    with monkeypatch.context() as patch:
        patch.setattr(StoredTensor, "rows", lambda *_: pytest.fail("a tensor was read"))
        with pytest.raises(CheckpointError, match=r"on other weights of the same shapes \(another revision.*any-base"):
            load_adapter_(model, adapter)
    assert not lora_layers(model)
    with monkeypatch.context() as patch:
        patch.setattr("qlora_lite.checkpoints.hub.empty_model", lambda *_: pytest.fail("a model was built"))
        with pytest.raises(CheckpointError, match=f"other weights of the same shapes.*than {folder}; name the base"):
            merge_checkpoint(folder, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()

    load_adapter_(model, adapter, any_base=True)
    save_adapter(model, tmp_path / "moved")
    assert check_trained_on_checkpoint(tmp_path / "moved", folder) == ["sizes", "weights"]
    assert merge_checkpoint(folder, adapter, tmp_path / "merged", any_base=True).files


def test_other_sizes_and_kinds_have_their_sentences(
    make_tiny_model: Callable[..., Path], small_model: Callable[..., Any], adapter: Path, tmp_path: Path
) -> None:
    wider = make_tiny_model(tmp_path / "wider", layers=3)
    with pytest.raises(CheckpointError, match=r"of another size \(num_hidden_layers 2, not 3\) than .*wider"):
        check_trained_on_checkpoint(adapter, wider)
    with pytest.raises(CheckpointError, match=r"another size .* than this model's base"):
        load_adapter_(load_quantized(wider), adapter)
    in_memory = small_model("Qwen2Config")
    with pytest.raises(CheckpointError, match=r"on another model \(model_type 'llama', not 'qwen2'; hidden"):
        load_adapter_(in_memory, adapter)
    renamed = json.loads((adapter / BASE_FILE).read_text())
    renamed["weights"]["layout"] = "0" * 64
    other = shutil.copytree(adapter, tmp_path / "other")
    (other / BASE_FILE).write_text(json.dumps(renamed))
    # The same model, saved under other names: nothing is proved of its weights.
    assert check_trained_on_checkpoint(other, make_tiny_model(tmp_path / "same")) == ["sizes"]


def test_what_nothing_is_known_of_is_not_refused(
    small_model: Callable[..., Any], tiny_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), adapter)
    theirs.save_pretrained(tmp_path / "pefts")
    assert not (tmp_path / "pefts" / BASE_FILE).exists()
    assert len(load_adapter_(load_quantized(tiny_folder), tmp_path / "pefts")) == 4
    in_memory = small_model("LlamaConfig")
    add_lora_(in_memory, LoraConfig(2, 4, target_modules=TARGETS))
    save_adapter(in_memory, tmp_path / "ours")
    said = read_base_identity(tmp_path / "ours")
    assert said is not None and said.weights is None and said.model["hidden_size"] == 32
    layers = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4)})
    add_lora_(layers, LoraConfig(2, 4, target_modules=["q_proj"]))
    save_adapter(layers, tmp_path / "layers")
    assert model_identity(layers) is None and not (tmp_path / "layers" / BASE_FILE).exists()
    gone = shutil.copytree(tiny_folder, tmp_path / "gone")
    model = AutoModelForCausalLM.from_pretrained(gone)
    shutil.rmtree(gone)
    load_adapter_(model, adapter)


def test_weights_packed_anew_are_not_the_checkpoints(tiny_folder: Path, adapter: Path, tmp_path: Path) -> None:
    model = load_quantized(tiny_folder)
    add_lora_(model, LoraConfig(2, 4, target_modules=TARGETS, init_lora_weights="loftq:2"))
    save_adapter(model, tmp_path / "own")
    said = read_base_identity(tmp_path / "own")
    assert said is not None and said.weights is None and said.model["model_type"] == "llama"
    remove_lora_(model)
    save_quantized(model, tmp_path / "base")
    assert not (tmp_path / "base" / BASE_FILE).exists()
    with pytest.raises(CheckpointError, match="this model's were packed by LoftQ"):
        load_adapter_(model, adapter)
    load_adapter_(load_quantized(tmp_path / "base"), tmp_path / "own")


def test_a_packed_checkpoint_is_believed_beside_its_own_tensors_alone(tiny_folder: Path, tmp_path: Path) -> None:
    for format in ("nf4", "fp4"):
        save_quantized(load_quantized(tiny_folder, QuantConfig(format)), tmp_path / format)
    shutil.copy(tmp_path / "nf4" / BASE_FILE, tmp_path / "fp4" / BASE_FILE)
    with pytest.raises(CheckpointError, match=r"was written for other tensors than .* holds; save"):
        load_quantized(tmp_path / "fp4")
    (tmp_path / "fp4" / BASE_FILE).unlink()
    base = model_identity(load_quantized(tmp_path / "fp4"))
    assert base is not None and base.weights is not None and base.weights.packed


def test_a_base_is_summed_once(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[Any] = []
    real = module.weight_hashes
    monkeypatch.setattr(module, "weight_hashes", lambda *given: sums.append(given) or real(*given))
    model = load_quantized(tiny_folder)
    add_lora_(model, LoraConfig(2, 4, target_modules=TARGETS))
    for name in ("a", "b"):
        save_adapter(model, tmp_path / name)
    load_adapter_(model, tmp_path / "a")
    assert len(sums) == 1


STRANGE: tuple[tuple[Any, str], ...] = (
    ([], "should hold a JSON object"),
    ({"version": True}, "has version True; only version 1 can be read"),
    ({"version": 1, "also": 1}, "has unknown keys: 'also'; remove"),
    ({"version": 1, "model": {"hidden_size": "64"}}, "hidden_size should be an integer; got '64'"),
    ({"version": 1, "model": {"model_type": {}}}, "model_type should be a string; got {}"),
    ({"version": 1, "model": [["x" * 999]]}, r"model should be an object of model_type, .*; got \[\['xxx.*\.\.\.$"),
    (
        {"version": 1, "model": {}, "weights": {"layout": ""}},
        "weights should be an object of layout, sample",
    ),
    (
        {"version": 1, "model": {}, "weights": {"layout": "0" * 64, "sample": "G" * 64, "packed": False}},
        "sample of weights should be a SHA-256 in hex; got 'GGG",
    ),
)


@pytest.mark.parametrize(("said", "sentence"), STRANGE)
def test_a_file_that_says_something_else_is_refused(said: Any, sentence: str, tmp_path: Path) -> None:
    (tmp_path / BASE_FILE).write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=sentence):
        read_base_identity(tmp_path)


def test_a_file_that_is_none_is_refused(adapter: Path, tiny_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(adapter, tmp_path / "other")
    model = load_quantized(tiny_folder)
    for text in ('{"version": ', "[" * 100_000, '{"version": ' + "9" * 5000 + "}"):
        (other / BASE_FILE).write_text(text)
        with pytest.raises(CheckpointError, match=BASE_FILE):
            load_adapter_(model, other)
    (other / BASE_FILE).unlink()
    (other / BASE_FILE).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="a pipe, socket or device"):
        load_adapter_(model, other)
    assert load_adapter_(model, other, any_base=True)


def test_the_commands_say_it(
    adapter: Path,
    tiny_folder: Path,
    changed: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = changed(one_tensor)
    monkeypatch.setattr("qlora_lite.checkpoints.hub.empty_model", lambda *_: pytest.fail("a model was built"))

    def command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qlora-lite", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return (int(ended.value.code or 0), *capsys.readouterr())

    status, out, _ = command("inspect", adapter, "--model", tiny_folder, "--json")
    assert status == 0 and f"{tiny_folder}: the same sizes and weights" in out
    assert "trained on: model_type llama, hidden_size 64, num_hidden_layers 2" in out
    said = json.loads(out.splitlines()[-1])
    assert said["same_as_model"] == ["sizes", "weights"]
    assert said["trained_on"] == json.loads((adapter / BASE_FILE).read_text())

    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text('{"text": "a"}')
    shutil.copytree(adapter, run / "adapter")
    for words in (
        ("inspect", adapter, "--model", folder),
        ("merge", "--adapter", adapter, "--model", folder, "--output", tmp_path / "merged"),
        ("train", "--model", folder, "--data", data, "--output", run, "--resume"),
    ):
        status, _, said = command(*words)
        assert status == 1 and "was trained on other weights of the same shapes" in said and len(said.splitlines()) == 1


def _code_of_its_own(folder: Path) -> None:
    said = json.loads((folder / "config.json").read_text())
    said |= {"model_type": "its_own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.LM"}}
    (folder / "config.json").write_text(json.dumps(said))


def _tensors_in_fp8(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}, folder / "new")
    (folder / "new").replace(folder / "model.safetensors")


@pytest.mark.parametrize("change", [_code_of_its_own, _tensors_in_fp8])
def test_of_a_checkpoint_that_only_transformers_reads_the_config_is_known(
    tiny_folder: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    change(folder)
    add_lora_(model, LoraConfig(2, 4, target_modules=TARGETS))
    save_adapter(model, tmp_path / "adapter")
    said = read_base_identity(tmp_path / "adapter")
    assert said is not None and said.weights is None and said.model["hidden_size"] == model.config.hidden_size
    remove_lora_(model)
    assert load_adapter_(model, tmp_path / "adapter")


def test_a_model_that_got_further_tokens_is_no_more_what_it_was_read_from(tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.resize_token_embeddings(128)
    model.save_pretrained(tmp_path / "more")
    add_lora_(model, LoraConfig(2, 4, target_modules=TARGETS))
    save_adapter(model, tmp_path / "adapter")
    assert check_trained_on_checkpoint(tmp_path / "adapter", tmp_path / "more") == ["sizes"]
    with pytest.raises(CheckpointError, match="vocab_size 128, not"):
        check_trained_on_checkpoint(tmp_path / "adapter", tiny_folder)


TOKENS = torch.arange(12).view(2, 6)


class Stored:
    """A weight as a checkpoint has it."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.shape = weight, weight.shape

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.weight[start:stop]


def error_of(weight: torch.Tensor, init: str, format: str = "nf4", double_quant: bool = True, **options: Any) -> float:
    """||W - Q - scaling B A||."""
    from qlora_lite.lora.init import initialize_

    base = QuantizedLinear(PackedWeight.of(weight, QuantConfig(format, double_quant=double_quant)))
    layer = LoraLayer(8, 16, base, dropout=0.0, **options)
    initialize_(layer, "layer", init, {"layer.weight": Stored(weight)})  # type: ignore[dict-item]
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
    new = repacked(old, torch.randn(64, 64), "layer.weight")
    assert (old.of_checkpoint, new.of_checkpoint) == (True, False)
    assert (new.format, new.blocksize, new.double_quant) == (old.format, old.blocksize, old.double_quant)
    assert all(torch.equal(buffer, before[name]) for name, buffer in old.state_dict().items())
    assert (
        packed_weights_hash([("layer", new)])
        != packed_weights_hash([("layer", old)])
        != packed_weights_hash([("other", old)])
    )


def test_an_adapter_comes_back_on_its_own_base_alone(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_quantized(tiny_folder, QuantConfig(), dtype=torch.float32)
    add_lora_(model, LoraConfig(4, 8, target_modules=TARGETS, init_lora_weights="loftq:3"))
    assert len(repacked_weights(model)) == len(lora_layers(model))
    expected = model(TOKENS).logits
    save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] is None
    merged = export_merged(model, tmp_path / "merged", torch.float32)
    with pytest.raises(CheckpointError, match="'original' has no meaning"):
        export_merged(model, tmp_path / "not", base="original")
    remove_lora_(model)
    save_quantized(model, tmp_path / "base")

    message = "packed again, and the model has another one; load the base that save_quantized wrote"
    with pytest.raises(CheckpointError, match=message):
        load_adapter_(load_quantized(tiny_folder, QuantConfig(), dtype=torch.float32), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="packed again, and the model has another one"):
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
    assert (parse_init("loftq:12"), parse_init("pissa")) == (("loftq", 12), ("pissa", 1))
    for wrong in ("loftq:0", "loftq:", "pissa:2"):
        with pytest.raises(ConfigError, match=r"init_lora_weights must be one of .*or loftq:N; got"):
            LoraConfig(init_lora_weights=wrong)
    with pytest.raises(ConfigError, match="writes no base; use it from Python"):
        words = ["train", "--model", tiny_folder, "--data", tiny_folder / "data.jsonl", "--output", tiny_folder / "out"]
        app([*map(str, words), "--init-lora-weights", "loftq:2"], standalone_mode=False)
    model = load_quantized(tiny_folder, QuantConfig(embedding_format="int8"))
    with pytest.raises(ConfigError, match=r"lm_head shares its packed weight with another module"):
        add_lora_(model, LoraConfig(2, target_modules=["lm_head"], init_lora_weights="loftq:2"))
    assert not lora_layers(model) and not repacked_weights(model)
