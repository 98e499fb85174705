"""Tests of the losses of tasks against those of transformers and trl, and of training with them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from qlora_lite import LoraConfig, QuantConfig, TrainConfig, add_lora_, load_quantized, train
from qlora_lite.errors import ConfigError, TrainingError
from qlora_lite.lora.adapters import adapter_parameters
from qlora_lite.training import step
from qlora_lite.training.evaluation import held_out_loss, held_out_scores
from qlora_lite.training.objective.task_losses import TASK_LOSSES, TaskLoss, labelled, task_loss

SEQUENCES, WORDS = "sequence-classification", "token-classification"
PAD = 1
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, PAD], [12, 13, PAD, PAD], [14, 15, 16, PAD]])
TEXT = {"input_ids": IDS, "attention_mask": (IDS != PAD).long()}
OTHER = torch.tensor([[20, 21, 22, 23, 24], [25, 26, PAD, PAD, PAD], [27, 28, 29, PAD, PAD], [30, 31, 32, 33, PAD]])
CASES: dict[str, tuple[str, int, Tensor]] = {
    "classes": (SEQUENCES, 3, torch.tensor([0, 2, 1, 2])),
    "numbers": (SEQUENCES, 1, torch.tensor([0.5, -1.0, 2.0, 0.25])),
    "several classes": (SEQUENCES, 2, torch.tensor([[1.0, 0], [1, 1], [0, 0], [0, 1]])),
    "words": (WORDS, 3, torch.tensor([[0, -100, 2, 1], [1, 1, -100, -100], [0, 2, -100, -100], [2, 2, 2, -100]])),
    "preferences": (SEQUENCES, 1, torch.ones(4)),
}
PROBLEMS = {"numbers": "regression", "several classes": "multi_label_classification"}


def case(name: str) -> dict[str, Tensor]:
    batch = {**TEXT, "labels": CASES[name][2]}
    if name == "preferences":
        batch |= {"rejected_input_ids": OTHER, "rejected_attention_mask": (OTHER != PAD).long()}
    return batch


def loaded(folder: Path, name: str) -> Any:
    task, labels, _ = CASES[name]
    model: Any = load_quantized(folder, QuantConfig(format="none"), dtype=torch.float32, task=task, labels=labels)
    model.config.pad_token_id, model.config.problem_type = PAD, PROBLEMS.get(name, "single_label_classification")
    return model


def rows(batch: dict[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    return {name: value[first:last] for name, value in batch.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_the_libraries(tiny_folder: Path, name: str) -> None:
    model, batch = loaded(tiny_folder, name), case(name)
    loss = task_loss(model, batch)
    assert loss is TASK_LOSSES[name]
    with torch.no_grad():
        if name == "preferences":  # as trl's RewardTrainer.compute_loss has it
            rewards = [model(OTHER if side else IDS, attention_mask=(OTHER if side else IDS) != PAD) for side in (0, 1)]
            chosen, rejected = (own.logits.squeeze(-1) for own in rewards)
            expected = -F.logsigmoid(chosen - rejected).mean()
        else:
            expected = model(**batch).loss
        assert float(loss(model, batch) / labelled(model, batch)) == pytest.approx(float(expected), rel=1e-5)


def run(folder: Path, name: str, batches: list[dict[str, Tensor]], **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = loaded(folder, name)
    add_lora_(model, LoraConfig(rank=2))
    config = TrainConfig(steps=settings.pop("steps", 2), learning_rate=1e-3, max_grad_norm=None, **settings)
    result = train(model, batches, config, progress=False)
    return result, {name: value.detach() for name, value in adapter_parameters(model).items()}


@pytest.mark.parametrize("name", ["words", "preferences"])  # counted by token, and with two texts in a row
def test_parts_of_a_batch_add_up_to_it(tiny_folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = case(name)
    whole, values = run(tiny_folder, name, [batch])
    assert whole.losses[1] < whole.losses[0]
    # Parts of one and of three rows: a mean of their means would be another number.
    parts, summed = run(tiny_folder, name, [rows(batch, 0, 1), rows(batch, 1, 4)], gradient_accumulation=2)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)

    loss = TASK_LOSSES[name]

    def limited(model: Any, part: dict[str, Tensor]) -> Tensor:
        if len(part["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss(model, part)

    monkeypatch.setattr(step, "loss_named", lambda chosen: limited)
    halves, halved = run(tiny_folder, name, [batch])
    assert halves.halved_at == 1 and halves.losses == pytest.approx(whole.losses, rel=1e-4)
    for other in (summed, halved):
        for key, value in values.items():
            torch.testing.assert_close(other[key], value, rtol=1e-2, atol=1e-4)


def test_a_resumed_run_of_a_classifier_equals_an_uninterrupted_one(tiny_folder: Path, tmp_path: Path) -> None:
    batches = [rows(case("preferences"), first, first + 2) for first in (0, 2)]

    def trained(name: str, batches: Any, resume: bool = False) -> tuple[Any, list[Tensor]]:
        torch.manual_seed(0)
        model = loaded(tiny_folder, "preferences")
        add_lora_(model, LoraConfig(rank=2))
        config = TrainConfig(steps=4, save_steps=2)
        result = train(model, batches, config, output_dir=tmp_path / name, resume=resume, progress=False)
        return result, [value.detach() for value in adapter_parameters(model).values()]

    whole, values = trained("whole", batches)
    ending = iter([*batches])
    with pytest.raises(Exception, match="the batches ended in step 3 of 4"):
        trained("cut", ending)
    resumed, again = trained("cut", iter([*batches, *batches]), resume=True)
    assert resumed.losses == whole.losses and all(map(torch.equal, again, values))


def test_held_out_examples_have_a_loss_and_scores(tiny_folder: Path) -> None:
    model, batch = loaded(tiny_folder, "classes"), case("classes")
    found = held_out_scores(model, [rows(batch, 0, 3), rows(batch, 3, 4)])
    assert found["loss"] == pytest.approx(held_out_loss(model, [batch]), rel=1e-5)
    with torch.no_grad():
        right = model(**TEXT).logits.argmax(-1) == batch["labels"]
    assert found["accuracy"] == pytest.approx(float(right.double().mean())) and 0 <= (found["f1"] or 0) <= 1


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("classes", {"labels": torch.tensor([0, 1, 2, 3])}, r"labels must be in \[0, 3\), the outputs of the head"),
        ("classes", {"labels": torch.zeros(4)}, "numbers need a head with one output, and it has 3; load it with"),
        ("several classes", {"labels": torch.zeros(4, 3)}, r"labels of several classes must be of shape \(4, 2\)"),
        ("words", {"labels": torch.tensor([0, 1, 2, 2])}, r"labels of words must be of shape \(4, 4\); got \(4,\)"),
        (
            "classes",
            {"input_ids": IDS.clone().masked_fill_(IDS == PAD, 2)},
            r"padded with the tokens \[2\], and ",
        ),
        ("classes", {"position_ids": torch.arange(4).expand(4, 4), "attention_mask": None}, "rows of several examples"),
        ("preferences", {"rejected_input_ids": OTHER + 1000}, r"tokens must be in \[0, 105\)"),
    ],
)
def test_batches_that_do_not_suit_are_refused(tiny_folder: Path, name: str, changes: dict[str, Any], says: str) -> None:
    batch = {key: value for key, value in {**case(name), **changes}.items() if value is not None}
    with pytest.raises(ConfigError, match=says):
        run(tiny_folder, name, [batch], steps=1)


BERT: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT |= {"vocab_size": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
T5: dict[str, Any] = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
T5 |= {"dropout_rate": 0.0, "decoder_start_token_id": 0}
BART: dict[str, Any] = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24}
BART |= {"decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 64}
BART |= {"max_position_embeddings": 16, "pad_token_id": PAD, "dropout": 0.0}


def small(name: str) -> Any:
    """A model of transformers with adapters on all layers."""
    torch.manual_seed(0)
    made: Any = {
        "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
        "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)),
        "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
        "embedding": lambda: transformers.BertModel(transformers.BertConfig(**BERT), add_pooling_layer=False),
        "decoder": lambda: transformers.LlamaModel(transformers.LlamaConfig(**BERT)),
    }[name]()
    made.config.pad_token_id = PAD
    add_lora_(made.requires_grad_(False).eval(), LoraConfig(rank=2))
    return made


HIDDEN = torch.where(IDS == 6, 6, -100).masked_fill(IDS == 13, 13)
TARGETS = torch.tensor([[8, 9, 2], [7, 2, -100], [5, 2, -100], [9, 9, 9]])


@pytest.mark.parametrize(("family", "labels"), [("t5", TARGETS), ("bart", TARGETS), ("bert", HIDDEN)])
def test_the_losses_of_tokens_are_those_of_transformers_and_fall(family: str, labels: Tensor) -> None:
    model, batch = small(family), {**TEXT, "labels": labels}
    with torch.no_grad():
        expected = float(model(**batch).loss)
    result = train(model, [batch], TrainConfig(steps=4, learning_rate=0.02, warmup_steps=0), progress=False)
    assert result.losses[0] == pytest.approx(expected, rel=1e-5) and result.losses[-1] < expected
    scores = held_out_scores(model, [rows(batch, 0, 3), rows(batch, 3, 4)])
    assert scores.keys() == {"loss", "accuracy"} and scores["loss"] == pytest.approx(held_out_loss(model, [batch]))


@pytest.mark.parametrize("family", ["embedding", "decoder"])
def test_anchors_find_their_texts_among_all_of_the_batch(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(family)
    others = {f"{name}_{key}": value for name in ("positive", "negative") for key, value in TEXT.items()}
    others["positive_input_ids"], others["positive_attention_mask"] = OTHER, (OTHER != PAD).long()
    batch = {**TEXT, **others, "labels": torch.ones(4)}
    with torch.no_grad():  # each text alone, without padding
        alone = [torch.stack([_embedding(model, row[row != PAD], family) for row in ids]) for ids in (IDS, OTHER, IDS)]
    anchors, candidates = F.normalize(alone[0], dim=-1), F.normalize(torch.cat(alone[1:]), dim=-1)
    expected = F.cross_entropy(20 * anchors @ candidates.T, torch.arange(4))
    result = train(model, [batch], TrainConfig(steps=3, learning_rate=0.01, warmup_steps=0), progress=False)
    assert result.losses[0] == pytest.approx(float(expected), rel=1e-4) and result.losses[-1] < result.losses[0]
    assert held_out_scores(model, [batch]).keys() == {"loss", "recall_at_1"}

    def out_of_memory(*arguments: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(step, "check_reach", lambda *words: None)
    loss = dataclasses.replace(TASK_LOSSES["similar texts"], outputs=out_of_memory)
    monkeypatch.setitem(TASK_LOSSES, "similar texts", loss)
    with pytest.raises(TrainingError, match="batches of similar texts are not divided"):
        train(model, [batch], TrainConfig(steps=1), progress=False)


def _embedding(model: Any, tokens: Tensor, family: str) -> Tensor:
    states = model(tokens[None]).last_hidden_state[0]
    found: Tensor = states.mean(0) if family == "embedding" else states[-1]
    return found


def test_a_masked_model_is_refused_where_nothing_is_hidden() -> None:
    with pytest.raises(ConfigError, match="no token of a batch is hidden, and a BertForMaskedLM sees them all"):
        train(small("bert"), [{"input_ids": IDS, "labels": IDS}], TrainConfig(steps=1), progress=False)


def test_a_decoder_needs_positions_for_its_targets_too() -> None:
    batch = {**TEXT, "labels": torch.full((4, 17), 5)}
    with pytest.raises(ConfigError, match="examples of 17 tokens do not fit into a BartForConditionalGeneration"):
        train(small("bart"), [batch], TrainConfig(steps=1), progress=False)


def test_a_causal_model_has_no_loss_of_a_task(small_model: Any) -> None:
    model = small_model("LlamaConfig")
    batch = {"input_ids": IDS, "labels": IDS}
    assert task_loss(model, batch) is None and int(labelled(model, batch)) == 12
    assert isinstance(TASK_LOSSES["classes"], TaskLoss)
