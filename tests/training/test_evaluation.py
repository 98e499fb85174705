"""Tests of held-out batches: alone, and in a run, which they do not change, but for what it keeps and when it ends."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qlora_lite import (
    LoraConfig,
    MemoryProfiler,
    QuantConfig,
    TrainConfig,
    add_lora_,
    load_adapter_,
    load_quantized,
    train,
)
from qlora_lite.errors import CheckpointError, ConfigError, NotFiniteError, Stopped
from qlora_lite.lora.adapters import adapter_parameters
from qlora_lite.training.evaluation import held_out_loss


def adapted(folder: Path, format: str = "nf4", dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    model = load_quantized(folder, QuantConfig(format=format), dtype=dtype)
    torch.manual_seed(0)
    add_lora_(model, LoraConfig(**{"rank": 4, "alpha": 8, **lora}))
    return model


def batch(rows: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    tokens = torch.randint(100, (rows, 12), generator=torch.Generator().manual_seed(seed))
    labels = tokens.clone()
    labels[0, :5] = -100
    return {"input_ids": tokens, "labels": labels}


BATCHES = [batch(seed=seed) for seed in range(3)]
HELD_OUT = [batch(3, seed=8), batch(1, seed=9)]


@pytest.mark.parametrize("format", ["nf4", "none"])
def test_held_out_loss_is_the_mean_over_all_labelled_tokens(tiny_folder: Path, format: str) -> None:
    model = adapted(tiny_folder, format, dropout=0.5)
    model.train()
    model.get_submodule("model.norm").eval()
    batches = [batch(3, seed=1), batch(1, seed=2), {**batch(seed=3), "labels": torch.full((2, 12), -100)}]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    found = held_out_loss(model, batches)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    with torch.no_grad():
        logits = [model(input_ids=b["input_ids"], use_cache=False).logits[:, :-1].float() for b in batches[:2]]
    sums = [
        F.cross_entropy(logit.flatten(0, 1), b["labels"][:, 1:].flatten(), reduction="sum")
        for logit, b in zip(logits, batches, strict=False)
    ]
    count = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    assert found == pytest.approx(float(sum(sums)) / count, rel=1e-5)
    with pytest.raises(ConfigError, match="held-out batches need a token with a label"):
        held_out_loss(model, batches[2:])


class Held(list[dict[str, torch.Tensor]]):
    """Held-out batches, with a signal when they are iterated over for the `at`th time."""

    def __init__(self, at: int = 0, given: Any = HELD_OUT) -> None:
        super().__init__(given)
        self.at, self.times = at, 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self.times += 1
        yield self[0]
        if self.times == self.at:
            signal.raise_signal(signal.SIGTERM)
        yield from self[1:]


def test_evaluations_change_nothing_of_a_run(tiny_folder: Path, memory_path: Path) -> None:
    config = {"steps": 3, "learning_rate": 1e-2, "neftune_noise_alpha": 5.0}

    def evaluate(model: Any) -> dict[str, float]:
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        return {"drawn": float(torch.rand(())), "also": random.random()}

    plain, model = adapted(tiny_folder, dropout=0.1), adapted(tiny_folder, dropout=0.1)
    before = held_out_loss(model, HELD_OUT)
    without = train(plain, BATCHES, TrainConfig(**config), progress=False)
    given = {"eval_batches": HELD_OUT, "evaluate": evaluate, "output_dir": memory_path / "run"}
    found = train(model, BATCHES, TrainConfig(eval_steps=2, **config), progress=False, **given)
    assert found.losses == without.losses
    kept = adapter_parameters(plain)
    assert all(torch.equal(value, kept[name]) for name, value in adapter_parameters(model).items())
    assert [evaluation.step for evaluation in found.evaluations] == [0, 2, 3] and not found.stopped_early
    assert found.evaluations[0].held_out_loss == pytest.approx(before, rel=1e-6)
    assert found.evaluations[2].held_out_loss == pytest.approx(held_out_loss(model, HELD_OUT), rel=1e-6)
    assert found.evaluations[0].scores["perplexity"] == pytest.approx(torch.tensor(before).exp().item(), rel=1e-5)
    lines = [json.loads(line) for line in (memory_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "held_out_loss" in line) for line in lines] == [
        *((0, True), (1, False), (2, False), (2, True), (3, False), (3, True)),
    ]
    assert [lines[n] for n in (0, 3, 5)] == [evaluation.to_line() for evaluation in found.evaluations]


def files_of(run: Path) -> dict[str, bytes]:
    return {
        path.relative_to(run).as_posix(): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name not in ("metrics.jsonl", "events.jsonl", "manifest.json")
    }


def figures_of(run: Path) -> list[dict[str, Any]]:
    measured = ("seconds", "tokens_per_second", "peak_bytes")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in measured} for line in lines]


def test_a_run_ends_early_with_its_best_adapter_and_so_does_one_stopped_in_an_evaluation(
    tiny_folder: Path, memory_path: Path
) -> None:
    """What is learned from random tokens by a large learning rate makes others less likely."""
    config = TrainConfig(steps=9, learning_rate=0.05, schedule="constant", eval_steps=1, patience=2, save_steps=3)
    given: dict[str, Any] = {"config": config, "progress": False}
    whole = memory_path / "whole"
    found = train(adapted(tiny_folder, dropout=0.1), BATCHES, eval_batches=Held(), output_dir=whole, **given)
    best, steps = found.best, len(found.steps)
    assert found.stopped_early and best is not None and steps == best.step + 2 < 9
    after = [evaluation.held_out_loss for evaluation in found.evaluations if evaluation.step > best.step]
    assert len(after) == 2 and min(after) >= best.held_out_loss
    model = load_quantized(tiny_folder, QuantConfig(), dtype=torch.float32)
    load_adapter_(model, whole / "best_adapter")
    assert held_out_loss(model, HELD_OUT) == pytest.approx(best.held_out_loss, rel=1e-6)
    card = (whole / "best_adapter" / "README.md").read_text()
    assert (
        f"| optimizer steps | {best.step} |" in card and f"| held-out loss after | {best.held_out_loss:.6g} |" in card
    )
    for at in (3, steps + 1):  # in the evaluation after step 2, and in the last one
        cut = memory_path / f"cut{at}"
        with pytest.raises(Stopped, match=f"stopped by SIGTERM after step {at - 1} of 9"):
            train(adapted(tiny_folder, dropout=0.1), BATCHES, eval_batches=Held(at), output_dir=cut, **given)
        assert [line["step"] for line in figures_of(cut) if "held_out_loss" in line] == list(range(at - 1))
        model = adapted(tiny_folder, dropout=0.1)
        resumed = train(model, BATCHES, eval_batches=Held(), output_dir=cut, resume=True, **given)
        assert resumed.stopped_early and resumed.losses == found.losses
        expected = files_of(whole)
        assert expected.items() <= files_of(cut).items() and figures_of(cut) == figures_of(whole)
    with pytest.raises(Stopped):  # a run that replaces another one leaves nothing of it
        train(adapted(tiny_folder), BATCHES, eval_batches=Held(2), output_dir=whole, overwrite=True, **given)
    assert not (whole / "best_adapter").exists() and len(figures_of(whole)) == 2


def test_the_best_by_exact_match_is_kept_and_waited_for_and_resumed_to_the_bit(
    tiny_folder: Path, memory_path: Path
) -> None:
    """The scores are given, by the step; the loss falls in each of them."""
    scores = {0: 1.0, 1: 0.25, 2: 0.5, 3: 0.5, 4: 0.5, 5: 0.25, 6: 0.25, 7: 1.0}
    by_exact_match = {"best_by": "exact_match", "patience": 2, "eval_steps": 1, "save_steps": 1}
    config = TrainConfig(steps=9, learning_rate=1e-3, keep_last=1, keep_best=2, **by_exact_match)  # type: ignore[arg-type]

    def trained(output: Path, stop: int = 99, first: int = 0, **options: Any) -> Any:
        steps = iter(range(first, 9))

        def evaluate(model: Any) -> dict[str, float]:
            if (step := next(steps)) == stop:
                signal.raise_signal(signal.SIGTERM)
            return {"exact_match": scores[step]}

        given = {"eval_batches": BATCHES, "evaluate": evaluate, "output_dir": output, "progress": False, **options}
        return train(adapted(tiny_folder, dropout=0.1), BATCHES, config, **given)

    found = trained(memory_path / "whole")
    losses = [evaluation.held_out_loss for evaluation in found.evaluations]
    assert losses[2] > losses[3] > losses[4], "of equal scores the lowest loss is better"
    assert found.stopped_early and len(found.steps) == 6 and found.best is not None and found.best.step == 4
    assert "| optimizer steps | 4 |" in (memory_path / "whole/best_adapter/README.md").read_text()
    kept = sorted(path.name for path in (memory_path / "whole/checkpoints").iterdir())
    assert kept == ["step-000003", "step-000004", "step-000006"]
    for stop in (3, 5):
        with pytest.raises(Stopped):
            trained(memory_path / f"{stop}", stop)
        resumed = trained(memory_path / f"{stop}", first=stop + 1, resume=True)
        assert resumed.best.step == 4 and resumed.losses == found.losses
        assert files_of(memory_path / f"{stop}") == files_of(memory_path / "whole")
        assert figures_of(memory_path / f"{stop}") == figures_of(memory_path / "whole")
    with pytest.raises(
        CheckpointError, match=r"best_by was 'exact_match' and is 'loss'; .*: --from-adapter \S+/adapter"
    ):
        config = TrainConfig(**{**vars(config), "best_by": "loss"})
        trained(memory_path / "3", resume=True)


@pytest.mark.parametrize(
    ("format", "lora", "checkpointing"), [("nf4", {}, "full"), ("none", {"modules_to_save": ["lm_head"]}, "none")]
)
def test_an_evaluation_takes_less_memory_than_a_forward_of_a_step(
    tiny_folder: Path, format: str, lora: dict[str, Any], checkpointing: str
) -> None:
    """The peak of a forward is rehearsed and planned to the byte (tests/planning/), so plans hold for evaluations."""
    with MemoryProfiler() as profiler:
        model = load_quantized(tiny_folder, QuantConfig(format=format))
        add_lora_(model, LoraConfig(rank=4, **lora))
        ids = torch.randint(100, (2, 64))
        rows = [{"input_ids": ids, "labels": ids}]
        config = TrainConfig(steps=2, eval_steps=1, checkpointing=checkpointing)
        train(model, rows, config, eval_batches=rows, profiler=profiler, progress=False)
    measured = {phase.name: phase.live_peak or 0 for phase in profiler.report().phases}
    assert 0 < measured["evaluation"] < measured["forward"]


class Other(list[dict[str, torch.Tensor]]):
    """Batches in another order each time."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self.reverse()
        return super().__iter__()


def test_wrong_held_out_batches_are_refused(tiny_folder: Path, memory_path: Path) -> None:
    model = adapted(tiny_folder)

    def refused(says: str, kind: type[Exception] = ConfigError, **given: Any) -> None:
        config = TrainConfig(**{"steps": 2, **given.pop("config", {})})
        with pytest.raises(kind, match=says):
            train(model, BATCHES, config, progress=False, **given)

    refused("eval_steps needs held-out batches; give eval_batches", config={"eval_steps": 1})
    refused("evaluate needs held-out batches; give eval_batches", evaluate=len)
    by_match = {"eval_steps": 1, "best_by": "exact_match"}
    given = {"config": by_match, "eval_batches": HELD_OUT}
    refused(r"needs answers that the model writes; give --eval-generate \(evaluate in Python\)$", **given)
    refused(r"evaluate returned \{'f1': 1\.0\}$", **given, evaluate=lambda model: {"f1": 1.0})
    refused(r"evaluate returned \{'exact_match': nan\}$", **given, evaluate=lambda model: {"exact_match": float("nan")})
    refused("eval_batches is an iterator, which gives its batches once", eval_batches=iter(HELD_OUT))
    refused("held-out batches need a token with a label", eval_batches=[])
    refused("tokens must be in", eval_batches=[{**batch(), "input_ids": batch()["input_ids"] + 50}])
    refused(
        "evaluate must return scores of other names than perplexity, step",
        eval_batches=HELD_OUT,
        evaluate=lambda model: {"step": 1, "perplexity": 2.0},
    )
    refused(
        "evaluate must return a dict of numbers by name; got {'answer': 'x'}",
        eval_batches=HELD_OUT,
        evaluate=lambda model: {"answer": "x"},
    )
    given = {"eval_batches": Other(HELD_OUT), "output_dir": memory_path / "other"}
    refused("eval_batches gave other batches than in the evaluation before", config={"eval_steps": 1}, **given)
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    refused("the held-out loss after step 0 is (nan|inf)", NotFiniteError, eval_batches=HELD_OUT)


def test_a_run_is_resumed_with_its_held_out_batches_only(tiny_folder: Path, memory_path: Path) -> None:
    given: dict[str, Any] = {"output_dir": memory_path / "run", "progress": False}
    config = TrainConfig(steps=1, save_steps=1)
    train(adapted(tiny_folder), BATCHES, config, eval_batches=HELD_OUT, **given)
    for other in (HELD_OUT[:1], None):
        with pytest.raises(CheckpointError, match="the held-out batches are not those of the run"):
            train(adapted(tiny_folder), BATCHES, config, eval_batches=other, resume=True, **given)
    resumed = train(adapted(tiny_folder), BATCHES, config, eval_batches=HELD_OUT, resume=True, **given)
    assert [evaluation.step for evaluation in resumed.evaluations] == [0, 1]


def test_memory_that_runs_out_halves_a_held_out_batch(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tried = adapted(tiny_folder), []
    expected = held_out_loss(model, HELD_OUT)

    def short_of_memory(module: Any, args: Any, given: dict[str, Any]) -> None:
        tried.append(len(given["input_ids"]))
        if len(given["input_ids"]) > 1 and len(tried) > 1:
            raise torch.OutOfMemoryError("out of memory")

    from qlora_lite.training import evaluation

    monkeypatch.setattr(evaluation, "checked_loss", lambda model, batch: ("logit-free", None))
    with model.model.register_forward_pre_hook(short_of_memory, with_kwargs=True):
        tried.append(0)
        assert held_out_loss(model, HELD_OUT) == pytest.approx(expected, rel=1e-5)
    assert tried == [0, 3, 1, 2, 1, 1, 1]
