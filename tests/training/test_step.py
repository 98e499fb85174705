"""Tests of one training step: out-of-memory errors and refused settings. Whole runs are in test_loop.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

from qlora_lite import LoraConfig, QuantConfig, TrainConfig, add_lora_, load_quantized, train
from qlora_lite.errors import ConfigError, TrainingError
from qlora_lite.lora.adapters import adapter_parameters
from qlora_lite.training import step as module
from qlora_lite.training.objective.losses import LOGIT_FREE, LOSSES

IDS = torch.arange(5, 65).view(5, 12)


def trained(folder: Path, config: TrainConfig, rows: int = 5) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = load_quantized(folder, QuantConfig(), dtype=torch.float32)
    add_lora_(model, LoraConfig(rank=2))
    result = train(model, [{"input_ids": IDS[:rows], "labels": IDS[:rows]}], config, progress=False)
    return model, result


def test_pretended_lack_of_memory_halves_the_batches_once(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not really run out here: a limit of the process would leave to chance at which allocation it does."""
    config = TrainConfig(steps=2)
    _, whole = trained(tiny_folder, config)
    loss, rows = LOSSES[LOGIT_FREE], []

    def limited(model: Any, batch: Any) -> Any:
        rows.append(len(batch["input_ids"]))
        if rows[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss(model, batch)

    limit = 3
    monkeypatch.setitem(LOSSES, LOGIT_FREE, limited)
    _, halved = trained(tiny_folder, config)
    assert whole.halved_at is None and halved.halved_at == 1 and rows == [1, 5, 2, 3, 2, 3]  # 1 of the check before
    assert halved.losses == pytest.approx(whole.losses, rel=1e-6)
    norms = [[step.gradient_norm for step in run.steps] for run in (halved, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    limit = 2
    with pytest.raises(TrainingError, match="memory ran out in step 1 again, with halved batches; train on shorter"):
        trained(tiny_folder, config)
    limit = 0
    monkeypatch.setattr(module, "check_reach", lambda *words: None)
    with pytest.raises(TrainingError, match="memory ran out in step 1 with one row; train on shorter rows"):
        trained(tiny_folder, config, rows=1)


@pytest.mark.parametrize("name", LOSSES)
def test_rows_and_halves_without_a_label_have_no_part_in_the_gradient(
    name: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean loss of a half without a label is NaN."""
    labels = IDS.clone()
    labels[:3] = -100
    data = {"input_ids": IDS, "labels": labels}
    monkeypatch.setattr(module, "choose_loss", lambda *words: (name, None))
    runs = []
    for batches in ([data], [{key: value[3:] for key, value in data.items()}]):
        for halved in (False, True):
            torch.manual_seed(0)
            model = load_quantized(tiny_folder, QuantConfig(), dtype=torch.float32)
            add_lora_(model, LoraConfig(rank=2))
            with monkeypatch.context() as patched:
                if halved:
                    patched.setattr(module.TrainingStep, "_gradients", failing_once(module.TrainingStep._gradients))
                result = train(model, batches, TrainConfig(steps=2), progress=False)
            assert result.halved_at == (1 if halved else None)
            runs.append([(step.loss, step.gradient_norm) for step in result.steps])
    for run in runs[1:]:
        for found, expected in zip(run, runs[0], strict=True):
            assert found == pytest.approx(expected, rel=1e-4)


def failing_once(gradients: Callable[..., Any]) -> Callable[..., Any]:
    failed: list[bool] = []

    def limited(*words: Any) -> Any:
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return gradients(*words)

    return limited


def test_pretended_sharding_is_refused_with_the_reason(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded = property(lambda self: DistributedType.FSDP)
    monkeypatch.setattr(module.Accelerator, "distributed_type", sharded)
    with pytest.raises(ConfigError, match="FSDP, which cannot shard a packed base: its bytes are buffers"):
        trained(tiny_folder, TrainConfig(steps=1))


@pytest.mark.parametrize("words", [["--use_fsdp", "--fsdp_version", "2"], ["--use_fsdp"], ["--use_megatron_lm"]])
def test_what_a_launch_asks_for_is_refused_where_accelerate_passes_over_it(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variables are those that `accelerate launch` of these words gives its processes; nothing is launched."""
    arguments = launch_command_parser().parse_args([*words, "--num_processes", "2", "program.py"])
    arguments, *_ = _validate_launch_command(arguments)
    for name, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(name, value)
    kind = "MEGATRON_LM" if "--use_megatron_lm" in words else "FSDP"
    with pytest.raises(ConfigError, match=f"accelerate is set to {kind}, which cannot shard a packed base"):
        train(torch.nn.Linear(2, 2), [], TrainConfig(steps=1))


@pytest.mark.parametrize(("name", "kept"), [("ours nf4, as it is", 1.0), ("ours nf4, bytes as parameters", 0.5)])
def test_torch_leaves_a_packed_base_whole_and_would_hold_it_as_parameters(
    name: str, kept: float, tiny_folder: Path, import_script: Callable[[str], Any]
) -> None:
    """Why FSDP is refused: the first of two processes, with a second one that is pretended; then one that is real."""
    script = import_script("profiling/sharded_base.py")
    case = next(case for case in script.CASES if case.name == name)
    seen = {}
    for backend, count in (("fake", 2), ("gloo", 1)):
        torch.distributed.init_process_group(backend, rank=0, world_size=count, store=torch.distributed.HashStore())
        try:
            seen[backend] = script.seen(case, tiny_folder)
        finally:
            torch.distributed.destroy_process_group()
    assert seen["fake"]["kept"] == pytest.approx(kept, abs=0.01)
    assert seen["gloo"]["bits"] and seen["gloo"]["gradients"][0] <= 1e-6 < seen["gloo"]["gradients"][1]


def single_examples(rows: int, packed: bool = True, tokens: int = 12) -> dict[str, torch.Tensor]:
    """A batch with one example in each row, laid out as a packed or as a padded one."""
    ids = IDS[:rows, :tokens]
    layout = {"position_ids": torch.arange(tokens).repeat(rows, 1)} if packed else {"attention_mask": ids * 0 + 1}
    return {"input_ids": ids, "labels": ids, **layout}


def with_convolutions(small_model: Callable[..., Any]) -> Any:
    model = small_model("Lfm2Config", vocab_size=128, layer_types=["conv", "full_attention"])
    add_lora_(model, LoraConfig(rank=2))
    return model


REFUSED = "a Lfm2ForCausalLM lets packed examples see each other"


@pytest.mark.parametrize("before", [0, 1])
def test_a_model_that_cannot_be_packed_is_refused_before_its_first_packed_batch(
    small_model: Callable[..., Any], tmp_path: Path, before: int
) -> None:
    """A packed batch of single examples shows nothing itself; the next one may hold several."""
    model = with_convolutions(small_model)
    start = {name: value.detach().clone() for name, value in adapter_parameters(model).items()}
    batches = [single_examples(2, packed=False)] * before + [single_examples(2)]
    with pytest.raises(ConfigError, match=REFUSED):
        train(model, batches, TrainConfig(steps=3), output_dir=tmp_path / "run", progress=False)
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert (len(metrics.read_text().splitlines()) if metrics.exists() else 0) == before
    equal = [torch.equal(value, start[name]) for name, value in adapter_parameters(model).items()]
    assert all(equal) is (before == 0)


def test_a_resumed_run_is_checked_too(
    small_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: dict[str, Any] = {"output_dir": tmp_path / "run", "progress": False}
    config = TrainConfig(steps=3, save_steps=2)
    with monkeypatch.context() as patched:
        patched.setattr(module, "check_packing", lambda *words: None)
        patched.setattr(module.TrainingStep, "_update", failing_after(2, module.TrainingStep._update))
        with pytest.raises(TrainingError, match="interrupted"):
            train(with_convolutions(small_model), [single_examples(2)], config, **run)
    with pytest.raises(ConfigError, match=REFUSED):
        train(with_convolutions(small_model), [single_examples(2)], config, resume=True, **run)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def failing_after(steps: int, update: Callable[..., float]) -> Callable[..., float]:
    def limited(step: Any, *words: Any) -> float:
        if step.number > steps:
            raise TrainingError("interrupted")
        return update(step, *words)

    return limited


def test_packing_is_checked_once_for_one_row_and_once_for_several(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []
    monkeypatch.setattr(module, "check_packing", lambda model, batch, rows: checked.append(rows))
    model, _ = trained(tiny_folder, TrainConfig(steps=1))
    assert checked == []
    batches = [single_examples(5, packed=False), *map(single_examples, (1, 1, 3, 2, 1))]
    train(model, batches, TrainConfig(steps=6), progress=False)
    assert checked == [1, 2]


SEEING = "a BertLMHeadModel lets tokens see later ones"


def test_a_model_that_sees_later_tokens_is_refused_before_its_first_step_and_when_it_goes_on(
    small_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bert() -> Any:
        model = small_model("BertConfig", vocab_size=128, add_pooling_layer=False)
        add_lora_(model, LoraConfig(rank=2))
        return model

    run: dict[str, Any] = {"output_dir": tmp_path / "run", "progress": False}
    config = TrainConfig(steps=3, save_steps=2)
    batches = [single_examples(2, packed=False)]
    with pytest.raises(ConfigError, match=SEEING):
        train(bert(), batches, config, output_dir=tmp_path / "none", progress=False)
    assert not (tmp_path / "none" / "metrics.jsonl").exists()
    with monkeypatch.context() as patched:
        patched.setattr(module, "check_causality", lambda *words: None)
        patched.setattr(module.TrainingStep, "_update", failing_after(2, module.TrainingStep._update))
        with pytest.raises(TrainingError, match="interrupted"):
            train(bert(), batches, config, **run)
    with pytest.raises(ConfigError, match=SEEING):
        train(bert(), batches, config, resume=True, **run)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("before", [0, 1])
def test_rows_that_are_too_long_are_refused_before_their_step(
    small_model: Callable[..., Any], tmp_path: Path, before: int
) -> None:
    model = small_model("GPT2Config", n_positions=11, vocab_size=128)
    add_lora_(model, LoraConfig(rank=2))
    batches = [single_examples(2, packed=False, tokens=11)] * before + [single_examples(2, packed=False)]
    with pytest.raises(ConfigError, match="examples of 12 tokens do not fit into a GPT2LMHeadModel, which"):
        train(model, batches, TrainConfig(steps=3), output_dir=tmp_path / "run", progress=False)
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert (len(metrics.read_text().splitlines()) if metrics.exists() else 0) == before


def test_what_a_model_itself_refuses_is_one_sentence(small_model: Callable[..., Any]) -> None:
    model = small_model("LlamaConfig", vocab_size=128)
    add_lora_(model, LoraConfig(rank=2))

    def picky(module: Any, args: Any, out: torch.Tensor) -> None:
        if out.shape[0] == 5:
            raise ValueError("rows must be even,\nand are not")

    model.model.embed_tokens.register_forward_hook(picky)
    says = r"a LlamaForCausalLM does not take input_ids of shape \(5, 12\): rows must be even, and are not$"
    with pytest.raises(ConfigError, match=says):
        train(model, [single_examples(5, packed=False)], TrainConfig(steps=1), progress=False)
