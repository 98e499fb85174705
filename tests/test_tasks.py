"""Tests of tasks against the classes of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized, save_adapter
from qlora_lite.checkpoints.hub import empty_model
from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.lora.auxiliary import trained_copies
from qlora_lite.quantization.layers import QuantizedLinear
from qlora_lite.tasks import TASKS, label_head, task_named, task_of, trained_whole

PLAIN = QuantConfig(format="none")
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
TOKENS = torch.arange(10, 22).view(2, 6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of a causal, a masked and an encoder-decoder language model."""
    torch.manual_seed(0)
    made: dict[str, Any] = {
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
        "bert": transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)),
        "t5": transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    }
    found = {name: tmp_path_factory.mktemp(name) for name in made}
    for name, folder in found.items():
        made[name].save_pretrained(folder)
    return found


@pytest.mark.parametrize(
    ("family", "task", "made"),
    [
        ("llama", None, "LlamaForCausalLM"),
        ("llama", "sequence-classification", "LlamaForSequenceClassification"),
        ("llama", "token-classification", "LlamaForTokenClassification"),
        ("llama", "embedding", "LlamaModel"),
        ("llama", "LlamaForTokenClassification", "LlamaForTokenClassification"),
        ("bert", None, "BertForMaskedLM"),
        ("bert", "sequence-classification", "BertForSequenceClassification"),
        ("bert", "embedding", "BertModel"),
        ("bert", transformers.BertForTokenClassification, "BertForTokenClassification"),
        ("t5", None, "T5ForConditionalGeneration"),
        ("t5", "embedding", "T5Model"),
    ],
)
def test_the_class_and_its_values_are_those_of_transformers(
    folders: dict[str, Path], family: str, task: str | type | None, made: str
) -> None:
    ours = load_quantized(folders[family], PLAIN, dtype=torch.float32, task=task)
    assert type(ours).__name__ == made
    assert task not in TASKS or task_of(ours).name == task
    theirs: Any = getattr(transformers, made).from_pretrained(folders[family])
    expected, created = theirs.state_dict(), set(ours.load_report.created)
    assert ours.state_dict().keys() == expected.keys()
    assert all(name in created or torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
    assert created == {name for name in expected if "score" in name or "classifier" in name or "pooler" in name}


def test_a_new_head_starts_as_in_transformers_and_the_same_in_each_call(folders: dict[str, Path]) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, other = (load_quantized(folders["bert"], task="sequence-classification", labels=30) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.classifier.weight, other.classifier.weight) and not one.classifier.bias.any()
    assert float(one.classifier.weight.float().std()) == pytest.approx(one.config.initializer_range, rel=0.1)
    assert "4 tensors are not in the checkpoint and start untrained:" in one.load_report.in_words()


@pytest.mark.parametrize(("family", "whole"), [("llama", ["score"]), ("bert", ["classifier", "bert.pooler.dense"])])
def test_a_new_head_stays_unpacked_and_is_trained_whole(
    folders: dict[str, Path], tmp_path: Path, family: str, whole: list[str]
) -> None:
    from peft import PeftModel

    model = load_quantized(folders[family], dtype=torch.float32, task="sequence-classification", labels=3)
    assert trained_whole(model) == whole and label_head(model) == whole[:1]
    assert not isinstance(model.get_submodule(whole[0]), QuantizedLinear)
    adapted = add_lora_(model, LoraConfig(rank=2))
    copies = trained_copies(model)
    assert copies.keys() == set(whole) and not set(whole) & set(adapted)
    with torch.no_grad():
        for copy in copies.values():
            for value in copy.trained.values():
                value.add_(torch.randn_like(value))
    save_adapter(model, tmp_path / "adapter")
    again = load_quantized(folders[family], PLAIN, dtype=torch.float32, task="sequence-classification", labels=3)
    theirs = PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert theirs.peft_config["default"].task_type == "SEQ_CLS"
    ours = load_quantized(folders[family], PLAIN, dtype=torch.float32, task="sequence-classification", labels=3)
    add_lora_(ours, LoraConfig(rank=2))
    for name, copy in trained_copies(ours).items():
        copy.load_state_dict(copies[name].state_dict())
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(TOKENS).logits, ours.eval()(TOKENS).logits)


def test_a_head_for_another_number_of_labels_is_replaced(folders: dict[str, Path], tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SIZES, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    kept = load_quantized(tmp_path)
    assert kept.load_report.created == [] and kept.config.id2label == {0: "no", 1: "yes"}
    other = load_quantized(tmp_path, labels=["a", "b", "c"])
    assert other.load_report.created == ["score.weight"] and other.score.weight.shape[0] == 3
    assert other.config.num_labels == 3 and other.config.label2id == {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize(
    ("family", "options", "says"),
    [
        ("llama", {"task": "chat"}, "task must be one of causal-lm, .*, or a class of transformers; got 'chat'"),
        (
            "llama",
            {"task": "masked-lm"},
            "no class for the task 'masked-lm' of model type 'llama'; it has some for",
        ),
        ("llama", {"task": "BertModel"}, "BertModel is made from a BertConfig; got a LlamaConfig"),
        ("llama", {"task": "LlamaConfig"}, "or a class of transformers; got <class '.*LlamaConfig'>"),
        ("llama", {"labels": 3}, "labels were given for a LlamaForCausalLM, whose task causal-lm has none"),
        ("bert", {"task": "sequence-classification", "labels": ["a", "a"]}, r"different names; got \['a', 'a'\]"),
        ("bert", {"task": "sequence-classification", "labels": 0}, "a number of at least 1 or different names; got 0"),
    ],
)
def test_wrong_tasks_and_labels_get_one_sentence(
    folders: dict[str, Path], family: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        load_quantized(folders[family], **options)


def test_other_parts_than_a_head_may_not_be_missing(folders: dict[str, Path], tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 1})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((folders["llama"] / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"9 tensors are missing: model\.layers\.1"):
        load_quantized(tmp_path, task="sequence-classification")


def test_the_task_of_models_that_were_not_loaded_here() -> None:
    assert task_of(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_head=1, n_layer=1))) is (
        task_named("causal-lm")
    )
    model = empty_model(transformers.BartConfig(), torch.float32, "seq2seq-lm")
    assert type(model).__name__ == "BartForConditionalGeneration" and task_of(model) is TASKS["seq2seq-lm"]
