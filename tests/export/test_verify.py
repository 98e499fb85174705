"""Tests of verification against transformers on the exported folder and against the live model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qlora_lite import LoraConfig, QuantConfig, add_lora_, export_merged, load_quantized, save_adapter
from qlora_lite.checkpoints.hub import load_tokenizer
from qlora_lite.checkpoints.safetensors_read import TensorFiles
from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.data.encoding import TokenizedExample
from qlora_lite.data.tokenization import tokenize_all
from qlora_lite.errors import ConfigError, QuantizationError
from qlora_lite.export import merged, merged_tensor, plan, verify
from qlora_lite.export.verify import BASES, Agreement, Verification, _paired_difference, _TokenStatistics, render
from qlora_lite.lora.adapters import adapters_disabled, lora_layers

RECORDS = [
    {"prompt": "how many?", "completion": "three"},
    {"prompt": "and now, after all of this time?", "completion": "42 or 43"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    {"text": "a line"},
    {"instruction": "add", "input": "1 2", "output": "3"},
]


@pytest.fixture(scope="module")
def examples(tiny_folder: Path) -> list[TokenizedExample]:
    return tokenize_all(RECORDS, load_tokenizer(tiny_folder)).examples


@pytest.fixture(scope="module")
def untied_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("untied")
    shutil.copytree(tiny_folder, folder, dirs_exist_ok=True)
    config = AutoConfig.from_pretrained(tiny_folder, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def trained(folder: Path, targets: Any = "all-linear", **quant: Any) -> Any:
    """Sharper than random: KL between models that expect every token alike says little."""
    model = load_quantized(folder, QuantConfig(**quant))
    add_lora_(model, LoraConfig(rank=3, alpha=7, target_modules=targets))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_A, std=0.3)
        nn.init.normal_(layer.lora_B, std=0.3)
    return model.eval()


@torch.no_grad()
def log_probabilities(model: Any, examples: list[TokenizedExample]) -> list[Tensor]:
    """(tokens, vocabulary), each example alone: no padding, no groups, all of the vocabulary at once."""
    return [model(torch.tensor([e.input_ids])).logits[0].double().log_softmax(-1) for e in examples]


def loss_of(found: list[Tensor], examples: list[TokenizedExample]) -> float:
    labels = [torch.tensor(example.labels[1:]) for example in examples]
    logits = torch.cat([values[:-1] for values in found])
    return float(nn.functional.cross_entropy(logits, torch.cat(labels), ignore_index=IGNORE_INDEX))


def agreement_of(adapter: list[Tensor], merged: list[Tensor], examples: list[TokenizedExample]) -> Agreement:
    ours, theirs = torch.cat(adapter), torch.cat(merged)
    kl = nn.functional.kl_div(theirs, ours, log_target=True, reduction="none").sum(-1)
    same = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
    return Agreement(float(kl.mean()), float(kl.max()), float(same), loss_of(merged, examples))


def assert_same(found: Agreement | None, expected: Agreement) -> None:
    assert found is not None and found.loss is not None
    assert found.mean_kl == pytest.approx(expected.mean_kl, rel=1e-3, abs=1e-9)
    assert found.worst_kl == pytest.approx(expected.worst_kl, rel=1e-3, abs=1e-8)
    assert found.top1_agreement == expected.top1_agreement
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)


@pytest.mark.parametrize(
    ("tied", "quant", "targets"),
    [
        (True, {}, "all-linear"),
        (True, {"format": "int8", "embedding_format": "int8"}, "all-linear"),
        (False, {"format": "int8", "embedding_format": "int8"}, ["q_proj", "down_proj", "embed_tokens", "lm_head"]),
        (False, {"format": "fp4", "double_quant": False}, ["k_proj", "embed_tokens"]),
        (True, {"format": "none"}, ["up_proj"]),
    ],
)
@pytest.mark.parametrize("base", BASES)
def test_figures_are_those_of_transformers_on_the_exported_folder(
    tiny_folder: Path,
    untied_folder: Path,
    tmp_path: Path,
    examples: list[TokenizedExample],
    tied: bool,
    quant: dict[str, Any],
    targets: Any,
    base: str,
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_folder if tied else untied_folder
    model = trained(folder, targets, **quant)
    save_adapter(model, tmp_path / "adapter")
    found = export_merged(model, tmp_path / base, torch.bfloat16, base=base, verify=examples).verification
    other = next(name for name in BASES if name != base)
    export_merged(model, tmp_path / other, torch.bfloat16, base=other)
    assert found is not None
    live = model.float()
    adapter = log_probabilities(live, examples)
    for name in BASES:
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        assert_same(found.merged[name], agreement_of(adapter, log_probabilities(exported, examples), examples))
    assert found.adapter_loss == pytest.approx(loss_of(adapter, examples), rel=1e-5)
    with adapters_disabled(live):
        assert found.base_loss == pytest.approx(loss_of(log_probabilities(live, examples), examples), rel=1e-5)
    assert abs(found.base_loss - found.adapter_loss) > 1e-3
    counted = found.examples, found.tokens, found.learned_tokens
    assert counted == (5, sum(len(e.input_ids) for e in examples), sum(e.learned_tokens for e in examples))
    assert json.loads((tmp_path / base / "merge_report.json").read_text())["verify"] == found.to_json()
    assert "verify" not in json.loads((tmp_path / other / "merge_report.json").read_text())
    disk = merged.merge_checkpoint(
        folder,
        tmp_path / "adapter",
        tmp_path / "disk",
        QuantConfig(**quant),
        torch.bfloat16,
        base=base,
        verify=examples,
    )
    assert disk.verification == found


def test_what_is_wrong_on_disk_shows(
    tiny_folder: Path, tmp_path: Path, examples: list[TokenizedExample], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(tiny_folder)
    sound = export_merged(model, tmp_path / "sound", verify=examples).verification
    write = merged.write_sharded

    def damaged(folder: Path, *given: Any) -> list[str]:
        files = write(folder, *given)
        tensor = TensorFiles(folder).stored["model.layers.1.mlp.down_proj.weight"]
        with open(tensor.path, "r+b") as file:
            file.seek(tensor.begin)
            file.write(torch.full((8, tensor.shape[1]), 0.5, dtype=torch.float16).view(torch.uint8).numpy().tobytes())
        return files

    monkeypatch.setattr(merged, "write_sharded", damaged)
    found = export_merged(model, tmp_path / "damaged", verify=examples).verification
    assert sound is not None and found is not None
    was, now = sound.merged["dequantized"], found.merged["dequantized"]
    assert was is not None and now is not None
    assert was.mean_kl < 1e-6 and was.top1_agreement > 0.95
    assert now.mean_kl > 1000 * was.mean_kl and now.worst_kl > 1000 * was.worst_kl and now.top1_agreement < 0.95
    assert found.merged["original"] == sound.merged["original"] and found.adapter_loss == sound.adapter_loss


def test_weights_that_are_no_numbers_any_more_are_refused(
    tiny_folder: Path, tmp_path: Path, examples: list[TokenizedExample], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = merged.write_sharded

    def damaged(folder: Path, *given: Any) -> list[str]:
        files = write(folder, *given)
        tensor = TensorFiles(folder).stored["model.norm.weight"]
        with open(tensor.path, "r+b") as file:
            file.seek(tensor.begin)
            file.write(b"\xff" * 8)
        return files

    monkeypatch.setattr(merged, "write_sharded", damaged)
    with pytest.raises(QuantizationError, match="logits of the dequantized model are not finite"):
        export_merged(trained(tiny_folder), tmp_path / "out", verify=examples)
    assert list(tmp_path.iterdir()) == []


def test_neither_groups_nor_blocks_nor_slices_change_what_is_found(
    tiny_folder: Path, tmp_path: Path, examples: list[TokenizedExample], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(tiny_folder)
    one = export_merged(model, tmp_path / "one", verify=examples).verification
    monkeypatch.setattr(verify, "GROUP_TOKENS", 40)
    monkeypatch.setattr(verify, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(merged_tensor, "SLICE_BYTES", 1)
    monkeypatch.setattr(plan, "SLICE_BYTES", 1)
    other = export_merged(model, tmp_path / "many", verify=examples).verification
    assert one is not None and other is not None and len(list(verify._groups(examples))) > 1
    for base in BASES:
        expected = one.merged[base]
        assert expected is not None
        assert_same(other.merged[base], expected)
    assert (other.difference, other.noise) == pytest.approx((one.difference, one.noise), rel=1e-3)


def test_prompts_without_completions_have_no_loss(tiny_folder: Path, tmp_path: Path) -> None:
    records = [{"prompt": "how many?"}, {"messages": [{"role": "user", "content": "and now?"}]}]
    asked = tokenize_all(records, load_tokenizer(tiny_folder), prompts_too=True).examples
    found = export_merged(trained(tiny_folder), tmp_path / "out", verify=asked).verification
    assert found is not None
    assert found.base_loss is found.adapter_loss is found.difference is found.noise is None
    assert found.learned_tokens == 0 and found.recommended == "dequantized"
    nearer, other = (found.merged[base] for base in BASES)
    assert nearer is not None and other is not None
    assert nearer.loss is other.loss is None and nearer.mean_kl < other.mean_kl
    assert "No held-out loss: the prompts have no completions.\nShip the dequantized base: no held-out" in render(found)


def test_without_its_checkpoint_the_original_is_not_guessed_at(
    tiny_folder: Path, tmp_path: Path, examples: list[TokenizedExample]
) -> None:
    model = trained(tiny_folder)
    model.config._name_or_path = ""
    found = export_merged(model, tmp_path / "out", verify=examples).verification
    assert found is not None and found.merged["original"] is None and found.merged["dequantized"] is not None
    assert found.missing == {"original": "no checkpoint with its model.embed_tokens.weight was found"}
    assert found.sentence() == (
        "Ship the dequantized base: original could not be compared (no checkpoint with its model.embed_tokens.weight "
        "was found)."
    )


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (list, "verify needs at least one example; got 0"),
        (lambda: [TokenizedExample([105], [105])], "verify has token 105, the model has 105"),
    ],
)
def test_examples_of_another_model_are_refused_before_anything_is_written(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], list[TokenizedExample]],
    says: str,
) -> None:
    monkeypatch.setattr(merged, "write_sharded", lambda *given: pytest.fail("something was written"))
    with pytest.raises(ConfigError, match=says):
        export_merged(trained(tiny_folder), tmp_path / "out", verify=make())


def test_examples_longer_than_the_table_of_positions_are_refused(small_model: Callable[..., Any]) -> None:
    model = small_model("GPT2Config", n_positions=20)
    with pytest.raises(ConfigError, match="an example of 21 tokens, the model takes 20; cut them to max_length"):
        verify.check_examples([TokenizedExample([1] * 21, [1] * 21)], model, 64)
    verify.check_examples([TokenizedExample([1] * 20, [1] * 20)], model, 64)


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    scale=st.sampled_from([0.0, 1.0, 300.0]),
    seed=st.integers(0, 1000),
)
def test_block_by_block_it_is_the_log_softmax(sizes: list[int], scale: float, seed: int) -> None:
    width = sum(sizes)
    logits = scale * torch.randn(4, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor([0, width - 1, IGNORE_INDEX, width // 2])
    tokens, first = _TokenStatistics(labels), 0
    for block in logits.split(sizes, 1):
        tokens.add(first, block)
        first += block.shape[1]
    expected = nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(tokens.losses(), expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(tokens.best, logits.argmax(1))


def test_the_standard_error_is_that_of_repeated_draws() -> None:
    """Of examples of equal length it is std / sqrt(k); of unequal ones what drawing anew from the same source gives."""
    differences = torch.randn(9).tolist()
    mean, noise = _paired_difference([2 * d for d in differences], differences, [4] * 9)
    expected = torch.tensor(differences) / 4
    assert (mean, noise) == pytest.approx((float(expected.mean()), float(expected.std() / 3)))
    draws = []
    for _ in range(400):
        learned = torch.randint(1, 20, (60,))
        one = learned * 0.1 + learned.sqrt() * torch.randn(60)
        draws.append(_paired_difference(one.tolist(), [0.0] * 60, learned.tolist()))
    means, noises = torch.tensor(draws).T
    assert float(noises.mean()) == pytest.approx(float(means.std()), rel=0.15)
    assert _paired_difference([3.0, 0.0], [1.0, 0.0], [4, 0]) == (0.5, None)


def verification(
    difference: float | None, noise: float | None, kl: float, written: str = "dequantized"
) -> Verification:
    loss = None if difference is None else 1.0
    merged = {
        "dequantized": Agreement(0.1, 1.0, 0.9, loss),
        "original": Agreement(kl, 1.0, 0.8, None if difference is None else 1.0 + difference),
    }
    return Verification(written, 8, 100, 50, 2.0, 1.0, merged, {}, difference, noise)


@pytest.mark.parametrize(
    ("found", "base", "because"),
    [
        (verification(-0.3, 0.1, 0.2), "original", "its held-out loss is 0.7000 against 1.0000, a difference of more"),
        (verification(0.3, 0.1, 0.0), "dequantized", "its held-out loss is 1.0000 against 1.3000, a difference of"),
        (verification(-0.1, 0.1, 0.2), "dequantized", "held-out losses are within noise, and it is no farther"),
        (verification(0.1, 0.1, 0.05), "original", "within noise, and it is no farther .* KL 0.05 against 0.1"),
        (verification(-0.3, None, 0.2), "dequantized", "one example gives no estimate of noise"),
        (verification(None, None, 0.05), "original", "no held-out loss was measured"),
        (verification(0.0, 0.0, 0.1), "dequantized", "mean KL 0.1 against 0.1"),
    ],
)
def test_the_base_to_ship(found: Verification, base: str, because: str) -> None:
    assert found.recommended == base and found.to_json()["recommended"] == base
    assert re.match(f"Ship the {base} base: .*{because}", found.sentence())
    assert ("export again with base original" in found.sentence()) == (base == "original")
    assert found.sentence().count(". ") == 0 and found.sentence().endswith(".")


def test_the_table() -> None:
    lines = render(verification(-0.3, 0.1, 0.2)).splitlines()
    assert lines[0].rstrip() == "8 prompts, 100 tokens, 50 of them learned"
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert rows == [
        ["base", "–", "–", "–", "2.0000"],
        ["adapter", "–", "–", "–", "1.0000"],
        ["merged, dequantized (written)", "0.1", "1", "90.00%", "1.0000"],
        ["merged, original", "0.2", "1", "80.00%", "0.7000"],
    ]
    assert lines[-1].startswith("Ship the original base")
