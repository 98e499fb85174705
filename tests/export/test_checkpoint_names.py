"""Tests of the names of exports against what transformers saves, and against llama.cpp's table of tensor names."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from qlora_lite import LoraConfig, QuantConfig, add_lora_, export_merged, load_quantized, quantize_base_, save_adapter
from qlora_lite.checkpoints import conversion
from qlora_lite.checkpoints.lazy_tensors import Concatenated, LazyTensor, Narrowed, ShapeOnlyTensor, read_slices
from qlora_lite.checkpoints.safetensors_read import TensorFiles, stored_tensors
from qlora_lite.data.encoding import TokenizedExample
from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.export import merged_tensor
from qlora_lite.export.checkpoint_names import CheckpointNames, _Inverse, is_read_by_matrix
from qlora_lite.export.merged import merge_checkpoint
from qlora_lite.export.merged_tensor import MergedTensor, view_slices
from qlora_lite.export.plain_weights import weights_to_write
from qlora_lite.export.quantized import save_quantized
from qlora_lite.export.weight_rows import DenseRows
from qlora_lite.lora.adapters import adapter_parameters, lora_layers

TOKENS = torch.arange(14).view(2, 7)
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
ARCHITECTURES = gguf.MODEL_ARCH
# The family, the layers with adapters (routers and stacks of experts included), and llama.cpp's architecture.
FAMILIES = {
    "MixtralConfig": (["q_proj", "gate", *EXPERTS], ARCHITECTURES.LLAMA),
    "Qwen2MoeConfig": (["v_proj", "gate", "shared_expert.up_proj", *EXPERTS], ARCHITECTURES.QWEN2MOE),
    "Qwen3MoeConfig": (["o_proj", "gate", *EXPERTS], ARCHITECTURES.QWEN3MOE),
    "GPTNeoXConfig": (["query_key_value", "dense_h_to_4h", "lm_head"], ARCHITECTURES.GPTNEOX),
    "Gemma3TextConfig": (["q_proj", "down_proj"], ARCHITECTURES.GEMMA3),
    "Phi3Config": (["qkv_proj", "gate_up_proj"], ARCHITECTURES.PHI3),
    "GlmConfig": (["q_proj", "gate_up_proj"], ARCHITECTURES.CHATGLM),
    "Glm4Config": (["k_proj", "gate_up_proj"], ARCHITECTURES.GLM4),
}
MIXTRAL = FAMILIES["MixtralConfig"][0]


@pytest.fixture(scope="module")
def saved(small_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a small random model as transformers saves it: under the names that its family has on the hub."""
    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            small_model(family, shared_expert_intermediate_size=24).save_pretrained(folders[family])
        return folders[family]

    return folder


def adapted(folder: Path, targets: list[str], format: str = "nf4", **options: Any) -> Any:
    model: Any = load_quantized(folder, QuantConfig(format=format), dtype=torch.float32)
    return with_adapters(model, targets, **options)


def with_adapters(model: Any, targets: list[str], **options: Any) -> Any:
    add_lora_(model, LoraConfig(rank=2, alpha=4, target_modules=targets, **options))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if not name.endswith("lora_A"):
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def header(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: stored.shape for name, stored in TensorFiles(folder).stored.items()}


def written(folder: Path) -> dict[str, Tensor]:
    return dict(TensorFiles(folder).items())


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def by_transformers(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def check_is_the_model(folder: Path, model: Any, dtype: torch.dtype = torch.float32) -> None:
    """Every weight that transformers reads is the merged one bit for bit, and so the logits are the same."""
    plain = by_transformers(folder, dtype)
    for name, layer in lora_layers(model).items():
        merged = plain.get_parameter(name if name.endswith(tuple(EXPERTS)) else f"{name}.weight")
        assert torch.equal(merged, layer.effective_weight(dtype)), name
    torch.testing.assert_close(plain.float()(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_exports_have_the_names_and_pieces_of_their_checkpoint(
    family: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    source, (targets, architecture) = saved(family), FAMILIES[family]
    model = adapted(source, targets)
    save_adapter(model, tmp_path / "adapter")
    options: dict[str, Any] = {"dtype": torch.float32, "load_dtype": torch.float32}
    live = export_merged(model, tmp_path / "live", torch.float32)
    disk = merge_checkpoint(source, tmp_path / "adapter", tmp_path / "disk", **options)
    assert header(tmp_path / "live") == header(source)
    assert equal(written(tmp_path / "live"), written(tmp_path / "disk"))
    figures = [{each.name: each for each in exported.report.tensors} for exported in (live, disk)]
    assert figures[0] == figures[1] and len(figures[0]) == len(weights_to_write(model)[0])
    check_is_the_model(tmp_path / "live", model)
    for folder in ("live", "disk"):
        config = [json.loads((path / "config.json").read_text()) for path in (source, tmp_path / folder)]
        assert config[0] == config[1]  # saved as fp32, exported as fp32

    known = gguf.get_tensor_name_map(architecture, 2)
    names = {re.sub(r"\.experts\.\d+\.", ".experts.", name) for name in header(tmp_path / "live")}
    assert [name for name in names if known.get_name(name, try_suffixes=(".weight", ".bias")) is None] == []

    model.config._name_or_path = ""  # transformers' reverse mapping decides, as in save_pretrained
    export_merged(model, tmp_path / "without", torch.float32)
    assert equal(written(tmp_path / "without"), written(tmp_path / "live"))


def test_the_models_own_names_on_request(saved: Callable[[str], Path], tmp_path: Path) -> None:
    source = saved("MixtralConfig")
    model = adapted(source, MIXTRAL)
    save_adapter(model, tmp_path / "adapter")
    export_merged(model, tmp_path / "live", torch.float32, names="model")
    options: dict[str, Any] = {"dtype": torch.float32, "load_dtype": torch.float32, "names": "model"}
    merge_checkpoint(source, tmp_path / "adapter", tmp_path / "disk", **options)
    theirs = by_transformers(tmp_path / "live").state_dict()
    assert "model.layers.1.mlp.experts.gate_up_proj" in theirs
    assert equal(written(tmp_path / "live"), theirs) and equal(written(tmp_path / "disk"), theirs)
    check_is_the_model(tmp_path / "live", model)
    # Such an export is a checkpoint too, and an export of its model has its names.
    export_merged(adapted(tmp_path / "live", ["q_proj"]), tmp_path / "again")
    assert header(tmp_path / "again") == header(tmp_path / "live")
    with pytest.raises(ConfigError, match="names must be checkpoint or model; got 'mine'"):
        export_merged(model, tmp_path / "out", names="mine")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shards_on_both_sides_and_plain_bases(saved: Callable[[str], Path], tmp_path: Path, dtype: torch.dtype) -> None:
    source = tmp_path / "source"
    by_transformers(saved("Qwen2MoeConfig")).save_pretrained(source, max_shard_size=20_000)
    assert len(list(source.glob("*.safetensors"))) > 3
    model = adapted(source, FAMILIES["Qwen2MoeConfig"][0], format="none")
    save_adapter(model, tmp_path / "adapter")
    one = export_merged(model, tmp_path / "one", dtype)
    many = export_merged(model, tmp_path / "many", dtype, max_shard_bytes=3_000)
    quant = QuantConfig(format="none")
    merge_checkpoint(source, tmp_path / "adapter", tmp_path / "disk", quant, dtype, load_dtype=torch.float32)
    assert len(many.files) > 10 and header(tmp_path / "many") == header(source) and one.report == many.report
    assert equal(written(tmp_path / "one"), written(tmp_path / "many"))
    assert equal(written(tmp_path / "one"), written(tmp_path / "disk"))
    plain = by_transformers(tmp_path / "many", dtype)
    for name, layer in lora_layers(model).items():
        weight = plain.get_parameter(name if name.endswith(tuple(EXPERTS)) else f"{name}.weight")
        assert torch.equal(weight, layer.effective_weight(dtype))
    config = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "many")]
    assert config[1] == config[0] | {"dtype": str(dtype).removeprefix("torch.")}


def test_experts_are_written_one_by_one_and_in_slices(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No piece is larger than a slice, and of all packed matrices two are held: the one that is read, and the next."""
    from qlora_lite.checkpoints import safetensors_write
    from qlora_lite.export.weight_rows import RepackedRows

    source = saved("MixtralConfig")
    model = adapted(source, EXPERTS)
    save_adapter(model, tmp_path / "adapter")
    whole = merge_checkpoint(source, tmp_path / "adapter", tmp_path / "whole")
    pieces: list[int] = []
    held: list[int] = []
    made: list[RepackedRows] = []
    write, pack = safetensors_write.raw_bytes, RepackedRows._packed

    def noted(tensor: Tensor) -> memoryview:
        pieces.append(tensor.numel())
        held.append(sum(rows._rows is not None for rows in made))
        return write(tensor)

    def packed(rows: RepackedRows) -> Any:
        made.append(rows)
        return pack(rows)

    monkeypatch.setattr(safetensors_write, "raw_bytes", noted)
    monkeypatch.setattr(RepackedRows, "_packed", packed)
    monkeypatch.setattr(merged_tensor, "SLICE_BYTES", 1)
    sliced = merge_checkpoint(source, tmp_path / "adapter", tmp_path / "sliced")
    assert equal(written(tmp_path / "whole"), written(tmp_path / "sliced"))
    experts = [tensor for name, tensor in written(tmp_path / "sliced").items() if ".experts." in name]
    assert len(experts) == 2 * 4 * 3 and max(pieces) < 64 * 64  # an update's tile has 64 rows
    assert max(held) == 1 and len(made) == len(set(map(id, made)))  # each matrix is packed once, after the one before
    figures = {each.name: each for each in sliced.report.tensors}
    for each in whole.report.tensors:
        assert figures[each.name].values == each.values and figures[each.name].moved == each.moved
        assert figures[each.name].weight == pytest.approx(each.weight, rel=1e-6)


def test_an_export_is_verified_under_the_checkpoints_names(saved: Callable[[str], Path], tmp_path: Path) -> None:
    source = saved("MixtralConfig")
    model = adapted(source, MIXTRAL)
    examples = [TokenizedExample(list(range(12)), list(range(12)))]
    save_adapter(model, tmp_path / "adapter")
    live = export_merged(model, tmp_path / "live", torch.float32, verify=examples).verification
    own = export_merged(model, tmp_path / "own", torch.float32, names="model", verify=examples).verification
    assert live is not None and live == own
    merged = live.merged["dequantized"]
    assert merged is not None and merged.mean_kl < 1e-6 and live.merged["original"] is not None
    options: dict[str, Any] = {"dtype": torch.float32, "load_dtype": torch.float32, "verify": examples}
    disk = merge_checkpoint(source, tmp_path / "adapter", tmp_path / "disk", base="original", **options)
    assert disk.verification is not None and disk.verification.merged == live.merged
    assert header(tmp_path / "disk") == header(source)


def test_trained_modules_and_token_rows(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Whole stacks of experts among them: the trained copy replaces each expert's matrices."""
    source = saved("MixtralConfig")
    options = {"modules_to_save": ["layers.1.mlp.experts", "norm"], "trainable_token_indices": [3, 9]}
    model = adapted(source, ["q_proj", "gate"], format="none", **options)
    save_adapter(model, tmp_path / "adapter")
    export_merged(model, tmp_path / "live", torch.float32)
    disk: dict[str, Any] = {"config": QuantConfig(format="none"), "dtype": torch.float32, "load_dtype": torch.float32}
    examples = [TokenizedExample(list(range(12)), list(range(12)))]
    done = merge_checkpoint(source, tmp_path / "adapter", tmp_path / "disk", verify=examples, **disk)
    assert header(tmp_path / "live") == header(source)
    assert equal(written(tmp_path / "live"), written(tmp_path / "disk"))
    check_is_the_model(tmp_path / "live", model)
    trained = model.get_submodule("model.layers.1.mlp.experts").trained["gate_up_proj"][2]
    name = "model.layers.1.block_sparse_moe.experts.2.w{}.weight"
    found = written(tmp_path / "live")
    assert torch.equal(torch.cat([found[name.format(part)] for part in (1, 3)]), trained)
    changed = found["model.embed_tokens.weight"] != written(source)["model.embed_tokens.weight"]
    assert changed.any(1).nonzero().flatten().tolist() == [3, 9]
    figures = {each.name: each.update for each in done.report.tensors}
    before = by_transformers(source).get_parameter("model.layers.1.mlp.experts.gate_up_proj")
    update = model.get_submodule("model.layers.1.mlp.experts").trained["gate_up_proj"] - before
    assert figures["model.layers.1.mlp.experts.gate_up_proj"] == pytest.approx(
        float(update.detach().square().sum()), rel=1e-4
    )
    assert done.verification is not None


@pytest.mark.parametrize("family", ["GPTNeoXConfig", "Gemma3TextConfig"])
def test_a_head_that_becomes_untied_gets_the_familys_name(
    small_model: Callable[..., Any], tmp_path: Path, family: str
) -> None:
    source = tmp_path / "source"
    small_model(family, tie_word_embeddings=True).save_pretrained(source)
    model = adapted(source, ["lm_head"])
    assert export_merged(model, tmp_path / "live", torch.float32).untied
    head = "embed_out.weight" if family == "GPTNeoXConfig" else "lm_head.weight"
    added = {head: tuple(model.get_submodule("lm_head").base_layer.weight.shape)}
    assert head not in header(source) and header(tmp_path / "live") == header(source) | added
    check_is_the_model(tmp_path / "live", model)


def test_names_of_older_checkpoints_come_back(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Not those that transformers would save: without the base model's prefix, and with tensors that it ignores."""
    source = tmp_path / "source"
    shutil.copytree(saved("Gemma3TextConfig"), source)
    tensors = {name.removeprefix("model."): tensor for name, tensor in written(source).items()}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.tensor([1e30, 2.0])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    model = adapted(source, ["q_proj"])
    save_adapter(model, tmp_path / "adapter")
    export_merged(model, tmp_path / "live", torch.float16)
    merge_checkpoint(source, tmp_path / "adapter", tmp_path / "disk", load_dtype=torch.float32)
    found = written(tmp_path / "live")
    assert header(tmp_path / "live") == header(source) and equal(found, written(tmp_path / "disk"))
    ignored = "layers.0.self_attn.rotary_emb.inv_freq"
    assert torch.equal(found[ignored], tensors[ignored])  # in its own dtype: fp16 has no 1e30
    export_merged(model, tmp_path / "own", torch.float16, names="model")
    assert header(tmp_path / "own").keys() == {f"model.{name}" for name in tensors if name != ignored}


def test_a_packed_base_gives_the_names_of_what_was_packed(saved: Callable[[str], Path], tmp_path: Path) -> None:
    source = saved("Qwen3MoeConfig")
    quant = QuantConfig(skip_modules=("experts", "lm_head"))
    save_quantized(load_quantized(source, quant, dtype=torch.float32), tmp_path / "packed")
    model: Any = with_adapters(load_quantized(tmp_path / "packed", dtype=torch.float32), ["q_proj"])
    save_adapter(model, tmp_path / "adapter")
    export_merged(model, tmp_path / "live", torch.float32)
    options: dict[str, Any] = {"dtype": torch.float32, "load_dtype": torch.float32}
    merge_checkpoint(tmp_path / "packed", tmp_path / "adapter", tmp_path / "disk", **options)
    assert header(tmp_path / "live") == header(source)
    assert equal(written(tmp_path / "live"), written(tmp_path / "disk"))
    check_is_the_model(tmp_path / "live", model)
    assert "quantization_config" not in json.loads((tmp_path / "live" / "config.json").read_text())


def test_a_model_that_transformers_loaded(saved: Callable[[str], Path], tmp_path: Path) -> None:
    source = saved("MixtralConfig")
    model = by_transformers(source)
    quantize_base_(model, QuantConfig())
    with_adapters(model, EXPERTS)
    export_merged(model, tmp_path / "out", torch.float32)
    model.config._name_or_path = ""
    export_merged(model, tmp_path / "without", torch.float32)
    assert header(tmp_path / "out") == header(source) == header(tmp_path / "without")
    check_is_the_model(tmp_path / "out", model)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision-language checkpoint of which transformers loads the language model as a causal language model."""
    import transformers

    torch.manual_seed(0)
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "num_attention_heads": 2, "head_dim": 16}
    widths = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "hidden_size": 32, "intermediate_size": 48}
    layers = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    text = {**heads, **widths, **layers, "vocab_size": 64, "num_key_value_heads": 2}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3_5Config(text_config=text, vision_config={**vision, "num_position_embeddings": 16})
    folder = tmp_path_factory.mktemp("pictures")
    transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_the_language_model_of_a_larger_checkpoint_is_exported_with_the_rest(pictures: Path, tmp_path: Path) -> None:
    import transformers

    language = load_quantized(pictures, dtype=torch.float32, task="causal-lm")
    model = with_adapters(language, ["q_proj", "down_proj"])
    model.config.bos_token_id = 7
    export_merged(model, tmp_path / "out", torch.float16)
    assert type(model).__name__ == "Qwen3_5ForCausalLM" and header(tmp_path / "out") == header(pictures)
    before, after = written(pictures), written(tmp_path / "out")
    towers = [name for name in before if name.startswith("model.visual.")]
    assert len(towers) > 5 and all(torch.equal(before[name], after[name]) for name in towers)
    was, config = (json.loads((folder / "config.json").read_text()) for folder in (pictures, tmp_path / "out"))
    assert config == was | {"dtype": "float16", "text_config": was["text_config"] | {"bos_token_id": 7}}
    whole = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(whole(TOKENS).logits, model(TOKENS).logits, rtol=1e-2, atol=1e-3)
    # Under the model's own names it is the language model alone, with a config of its own.
    export_merged(model, tmp_path / "own", torch.float32, names="model")
    assert json.loads((tmp_path / "own" / "config.json").read_text())["model_type"] == "qwen3_5_text"
    check_is_the_model(tmp_path / "own", model)
    save_quantized(load_quantized(pictures, task="causal-lm"), tmp_path / "packed")
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["model_type"] == "qwen3_5_text"


def test_what_cannot_be_converted_back_is_refused_with_the_way_that_works(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import conversion_mapping, core_model_loading

    model = adapted(saved("MixtralConfig"), ["q_proj"])
    model.config._name_or_path = ""
    rule = core_model_loading.WeightConverter(
        "attn.q.weight", "self_attn.q_proj.weight", operations=[core_model_loading.PermuteForRope()]
    )
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model, **options: [rule])
    with pytest.raises(CheckpointError) as raised:
        export_merged(model, tmp_path / "out")
    for part in (
        "this MixtralForCausalLM cannot be written with its checkpoint's names: model.layers.0.self_attn.q_proj.weight",
        "transformers makes it by PermuteForRope, which is not supported",
        "ask for names='model' (--names model)",
    ):
        assert part in str(raised.value)
    monkeypatch.setattr(core_model_loading.PermuteForRope, "reverse_op", None)
    with pytest.raises(CheckpointError, match="transformers cannot undo the conversion of a MixtralForCausalLM's"):
        export_merged(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    export_merged(model, tmp_path / "out", names="model")


def test_a_source_of_another_shape_is_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    model = adapted(saved("MixtralConfig"), ["q_proj"])
    files = dict(TensorFiles(saved("MixtralConfig")).stored)
    for name in [name for name in files if ".experts.3." in name]:
        del files[name]
    with pytest.raises(CheckpointError, match=r"gate_up_proj is \(4, 96, 32\) and was made of tensors that give \(3, "):
        CheckpointNames(model, files).views(weights_to_write(model)[0])


def exported(name: str, tensor: Tensor, view: LazyTensor) -> MergedTensor:
    parts = list(tensor) if is_read_by_matrix(view) else [tensor]
    return MergedTensor(name, tuple(tensor.shape), tensor.dtype, [(DenseRows(part),) for part in parts], None, print)


@given(rows=st.integers(1, 3), columns=st.integers(1, 5), count=st.integers(1, 4))
def test_the_inverse_of_each_operation_gives_the_checkpoint_back(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, count: int
) -> None:
    from transformers import core_model_loading as theirs

    folder = tmp_path_factory.mktemp("rule")
    merge = theirs.MergeModulelist(dim=0)
    matrices, whole = [(2 * rows, columns)] * count, [(2 * rows, columns)]
    shapes = {"a": (rows, columns), "b": (2 * rows, columns)}
    rules: list[tuple[Any, dict[str, list[tuple[int, ...]]]]] = [
        (theirs.WeightConverter(["e.*.a", "e.*.b"], "e.ab", [merge, theirs.Concatenate(dim=1)]), {}),
        (theirs.WeightConverter(["e.*.a"], "e.a", [merge]), {}),
        (theirs.WeightConverter(["e.*.a"], "e.a", [merge, theirs.Transpose(1, 2)]), {}),
        (theirs.WeightConverter("e.a", "e.b", [theirs.Transpose(1, 2)]), {"e.a": [(count, rows, columns)]}),
        (theirs.WeightConverter("e.a", "e.b", [theirs.Transpose(0, 1)]), {"e.a": [(count, rows, columns)]}),
        (theirs.WeightConverter(["a", "b"], "ab", [theirs.Concatenate(dim=0)]), {"a": whole, "b": whole}),
        (theirs.WeightConverter(["a", "b"], "ab", [theirs.Concatenate(dim=1)]), {"a": whole, "b": whole}),
        (theirs.WeightConverter("ab", ["a", "b"], [theirs.Chunk(dim=0)]), {"ab": whole}),
        (theirs.WeightConverter("ab", ["a", "b"], [theirs.Chunk(dim=1)]), {"ab": [(rows, 2 * columns)]}),
        (theirs.WeightConverter("ab", ["a", "b"], [theirs.Chunk(dim=0)]), {"ab": [(2 * rows,)]}),
        (theirs.WeightConverter("a", "b", [theirs.Transpose(0, 1)]), {"a": whole}),
        (theirs.WeightConverter("a", "b", [theirs.Interleave(dim=0)]), {"a": whole}),
        (theirs.WeightConverter("a", "b", [theirs.Interleave(dim=0, inverse=True)]), {"a": whole}),
        (theirs.WeightConverter("e.a", "e.b", [theirs.Interleave(dim=1)]), {"e.a": [(count, 2 * rows, columns)]}),
        (theirs.WeightConverter("ab", ["a", "b"], [theirs.Interleave(dim=0), theirs.Chunk(dim=0)]), {"ab": whole}),
        (theirs.WeightConverter("ab", ["a", "b"], [theirs.Split(dim=0)]), {"ab": [(3 * rows, columns)]}),
    ]
    used = set()
    for rule, given_shapes in rules:
        sources = given_shapes or dict.fromkeys(rule.source_patterns, matrices)
        names = {key: [f"{key}.{index}" for index in range(len(several))] for key, several in sources.items()}
        tensors = {
            name: torch.randn(shape)
            for key, several in sources.items()
            for name, shape in zip(names[key], several, strict=True)
        }
        save_file(tensors, folder / "x.safetensors")
        patterns = (tuple(rule.source_patterns), tuple(rule.target_patterns), tuple(rule.operations))
        used |= {type(operation).__name__ for operation in rule.operations}
        plan = conversion.Conversion(rule.target_patterns[0], names, *patterns)
        views = conversion._made(plan, stored_tensors(folder / "x.safetensors"), shapes)
        inverse = _Inverse()
        for number, (name, view) in enumerate(views.items()):
            model = torch.cat([part for _, part in read_slices(view, 64)])
            inverse.add(view, exported(name, model, view), (number, 0, 0))
        inverse.join_parts()
        assert inverse.problems == []
        found = {name: torch.cat(list(view_slices(view))).view(view.shape) for name, (_, view) in inverse.made.items()}
        assert equal(found, tensors)
    assert used == set(conversion.OPERATIONS)


def test_parts_of_a_tensor_are_not_enough() -> None:
    whole = ShapeOnlyTensor("qkv", torch.float32, (6, 4))
    part = Narrowed("q", whole, 0, 0, 2)
    inverse = _Inverse()
    inverse.add(part, exported("q", torch.ones(2, 4), part), (0, 0, 0))
    inverse.join_parts()
    assert inverse.problems == ["the model has only parts of qkv"]
    for place in range(2):
        inverse.add(whole, exported("x", torch.ones(6, 4), whole), (place, 0, 0))
    assert inverse.problems[1:] == ["qkv would be written twice"]
    mixed = Concatenated("x", (whole, whole), 0)
    assert not is_read_by_matrix(mixed)
