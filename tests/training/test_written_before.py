"""Files written before the package was divided into rooms still load: an adapter, a run, a packed checkpoint.

`written_before/` was made at that time, in one thread, from the tiny model of examples/tiny_model.py with one layer of
16 features: NF4 with double quantization, DoRA and rsLoRA of rank 4 on q_proj and down_proj, a trained `model.norm`,
four steps of two rows. `run/` has its checkpoint of step 2 and its adapter of step 4; `expected.json` has the losses of
all steps and the logits after the last one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lite import LoraConfig, QuantConfig, TrainConfig, add_lora_, load_adapter_, load_quantized, train
from qlora_lite.checkpoints import load_tokenizer
from qlora_lite.compute.environment import arithmetic
from qlora_lite.data import batches, read_records, tokenize_all

BEFORE = Path(__file__).parent / "written_before"
QUANT = QuantConfig(format="nf4", blocksize=64, double_quant=True)
LORA = LoraConfig(
    rank=4,
    alpha=8,
    dropout=0.1,
    target_modules=["q_proj", "down_proj"],
    use_rslora=True,
    variant="dora",
    layers_to_transform=[0],
    modules_to_save=["model.norm"],
)


@pytest.fixture(scope="module")
def expected() -> Any:
    return json.loads((BEFORE / "expected.json").read_text())


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def logits_of(model: Any, tokens: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens)).logits[0].float()


def test_an_adapter_computes_what_it_did(expected: Any) -> None:
    model = load_quantized(BEFORE / "model", QUANT)
    load_adapter_(model, BEFORE / "run" / "adapter")
    torch.testing.assert_close(logits_of(model, expected["tokens"]), torch.tensor(expected["logits"]))


def test_a_packed_checkpoint_computes_what_its_original_does(expected: Any) -> None:
    packed, original = load_quantized(BEFORE / "packed"), load_quantized(BEFORE / "model", QUANT)
    assert torch.equal(logits_of(packed, expected["tokens"]), logits_of(original, expected["tokens"]))


def as_if_written_here(checkpoint: Path) -> bool:
    """Writes this machine and these versions into a checkpoint's state; returns whether they are those of then."""
    state_file, manifest_file = checkpoint / "state.json", checkpoint / "manifest.json"
    state, manifest = json.loads(state_file.read_text()), json.loads(manifest_file.read_text())
    here = arithmetic(torch.device("cpu"))
    same = state["machine"] == here
    state["machine"] = here
    state_file.write_text(json.dumps(state))
    entry = next(value for value in manifest.values() if isinstance(value, dict) and "state.json" in value)
    content = state_file.read_bytes()
    entry["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest_file.write_text(json.dumps(manifest))
    return same


@pytest.mark.usefixtures("one_thread")
def test_a_run_goes_on_to_the_losses_that_it_had(tmp_path: Path, expected: Any) -> None:
    run = tmp_path / "run"
    shutil.copytree(BEFORE / "run", run)
    same_machine = as_if_written_here(run / "checkpoints" / "step-000002")
    tokenizer = load_tokenizer(BEFORE / "model")
    examples = tokenize_all(read_records(BEFORE / "data.jsonl"), tokenizer).examples
    torch.manual_seed(0)
    model = load_quantized(BEFORE / "model", QUANT)
    add_lora_(model, LORA)
    stream = batches(examples, 2, 0, pad_token_id=tokenizer.pad_token_id)
    config = TrainConfig(steps=4, learning_rate=1e-3, save_steps=2, keep_last=2, seed=0)
    result = train(model, stream, config, output_dir=run, resume=True)
    assert result.steps[-1].step == 4
    if same_machine:
        assert result.losses == expected["losses"]
    assert result.losses == pytest.approx(expected["losses"], rel=1e-3)
