"""Tests of peft's API on packed models. What it computes is compared with peft in tests/interop/peft_matrix.py."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from qlora_lite import load_quantized
from qlora_lite.errors import CheckpointError, ConfigError, TargetError
from qlora_lite.integrations import get_peft_model, load_peft_model, lora_config
from qlora_lite.integrations.peft_linear import PackedLinear
from qlora_lite.quantization.layers import QuantizedEmbedding, QuantizedLinear
from qlora_lite.training.forward.fuse import fuse_

TOKENS = torch.arange(16, 40).view(2, 12)
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On small models two threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pairs(import_script: Callable[[str], Any]) -> Any:
    return import_script("tests/interop/peft_pairs.py")


@pytest.fixture
def packed(pairs: Any) -> Any:
    return pairs.packed_model("nf4")


def settings(**given: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 2, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]} | given)


def adapted(model: nn.Module) -> set[str]:
    """The last parts of the names of the layers with an adapter."""
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def test_get_peft_model_takes_the_place_of_peft(packed: Any) -> None:
    config = settings(target_modules="all-linear")
    model = get_peft_model(packed, config, "mine", autocast_adapter_dtype=False)
    assert isinstance(model, peft.PeftModelForCausalLM) and isinstance(model.base_model, peft.LoraModel)
    assert model.active_adapter == "mine" and adapted(model) == LINEAR
    assert config.target_modules == "all-linear" and config._custom_modules is None  # copied
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained and all(".mine." in name for name in trained)


def test_plain_peft_does_not_pass_packed_layers_over(packed: Any) -> None:
    with pytest.raises(ValueError, match="QuantizedLinear"):
        peft.get_peft_model(copy.deepcopy(packed), settings())
    with pytest.raises(ValueError, match="target_modules"):
        peft.get_peft_model(packed, settings(target_modules="all-linear"))


@pytest.mark.parametrize(
    "adapt",
    [
        lambda model, config: peft.get_peft_model(model, config),
        lambda model, config: peft.inject_adapter_in_model(config, model),
        lambda model, config: (model.add_adapter(config), model)[1],
    ],
    ids=["get_peft_model", "inject_adapter_in_model", "transformers"],
)
def test_a_prepared_configuration_is_for_other_functions(packed: Any, adapt: Callable[..., Any]) -> None:
    assert adapted(adapt(packed, lora_config(packed, r=2))) == LINEAR


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"init_lora_weights": "pissa"}, ConfigError, "do not have init_lora_weights='pissa'; add_lora_ has more"),
        ({"use_qalora": True}, ConfigError, "do not have use_qalora=True"),
        ({"layer_replication": [(0, 1)]}, ConfigError, r"do not have layer_replication=\[\(0, 1\)\]"),
        ({"target_parameters": ["q_proj.weight"]}, TargetError, "packed layers: .*q_proj.weight.*in target_modules"),
        ({"modules_to_save": ["o_proj"]}, TargetError, r"layers\.0\.self_attn\.o_proj, .*: packed weights cannot be"),
    ],
)
def test_what_cannot_be_done_is_refused(packed: Any, given: dict[str, Any], error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        get_peft_model(packed, settings(**given))
    model = get_peft_model(packed, settings())
    before = model(TOKENS).logits
    with pytest.raises(error, match=says):  # also later, when the model is left as it was
        model.add_adapter("second", settings(**given))
    assert list(model.peft_config) == ["default"] and torch.equal(model(TOKENS).logits, before)


def test_a_file_is_found_as_by_peft_and_its_other_values_are_not_lost(pairs: Any, tmp_path: Path) -> None:
    model = pairs.pair("nf4", embedding="int8", target_modules=["embed_tokens", "q_proj"]).ours
    model.save_pretrained(tmp_path / "in", save_embedding_layers=False)
    (tmp_path / "in").rename(tmp_path / "below")
    again = load_peft_model(pairs.packed_model("nf4", "int8"), tmp_path, subfolder="below")
    assert torch.equal(pairs.logits(again), pairs.logits(model))
    plain = pairs.unpacked(pairs.packed_model("nf4", "int8"))
    plain.resize_token_embeddings(50)
    peft.get_peft_model(plain, settings()).save_pretrained(tmp_path / "larger", save_embedding_layers=True)
    with pytest.raises(CheckpointError, match=r"holds values of lm_head, model\.embed_tokens, which are packed"):
        load_peft_model(pairs.packed_model("nf4", "int8"), tmp_path / "larger")


def test_a_fused_model_is_trained_through_peft(tiny_folder: Path) -> None:
    model = load_quantized(tiny_folder, dtype=torch.float32)
    fuse_(model)
    trained = get_peft_model(model, settings(target_modules="all-linear"))
    output = trained(input_ids=TOKENS, labels=TOKENS)
    output.loss.backward()
    assert output.logits is None and model.fusion.loss == "logit-free"
    parameters = [value for value in trained.parameters() if value.requires_grad]
    assert parameters and all(value.grad is not None for value in parameters)


@pytest.mark.parametrize("embedding", ["none", "int8"])
def test_a_fused_loss_has_the_adapter_of_the_head(pairs: Any, embedding: str) -> None:
    model = pairs.packed_model("nf4", embedding)
    fuse_(model)
    model(input_ids=TOKENS, labels=TOKENS)
    assert model.fusion.loss == "logit-free"
    found = get_peft_model(model, settings(target_modules=["lm_head"]))  # of which B is 0
    found(input_ids=TOKENS, labels=TOKENS)
    pairs.fill_(found)
    loss = found(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    assert all(value.grad is not None for value in found.parameters() if value.requires_grad)
    own = found(input_ids=TOKENS, labels=TOKENS, output_hidden_states=True).loss
    torch.testing.assert_close(loss, own)


def test_a_merged_embedding_is_not_tied_any_more(pairs: Any) -> None:
    model = pairs.pair("nf4", embedding="int8", target_modules=["embed_tokens"]).ours
    expected = pairs.logits(model)
    whole = model.merge_and_unload()
    assert not whole.config.tie_word_embeddings and isinstance(whole.lm_head, QuantizedLinear)
    pairs.check_equal(pairs.logits(whole), expected)
    kept = pairs.pair("nf4", embedding="int8", target_modules=["q_proj"]).ours.merge_and_unload()
    assert kept.config.tie_word_embeddings and isinstance(kept.model.embed_tokens, QuantizedEmbedding)
