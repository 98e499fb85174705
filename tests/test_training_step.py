"""One step of a run: what it does when memory runs out, and where it refuses to run. (Whole runs: test_training.py.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType

from qlora_lite import LoraConfig, QuantConfig, TrainConfig, add_lora_, load_quantized, train
from qlora_lite import training_step as module
from qlora_lite.errors import ConfigError, TrainingError

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
    choose, rows = module.choose_loss, []

    def narrow(*words: Any) -> tuple[Any, Any]:
        loss, because = choose(*words)

        def limited(model: Any, batch: Any) -> Any:
            rows.append(len(batch["input_ids"]))
            if rows[-1] > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return loss(model, batch)

        return limited, because

    limit = 3
    monkeypatch.setattr(module, "choose_loss", narrow)
    _, halved = trained(tiny_folder, config)
    assert whole.halved_at is None and halved.halved_at == 1 and rows == [5, 2, 3, 2, 3]
    assert halved.losses == pytest.approx(whole.losses, rel=1e-6)
    norms = [[step.gradient_norm for step in run.steps] for run in (halved, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    limit = 2
    with pytest.raises(TrainingError, match="memory ran out in step 1 again, with halved batches; train on shorter"):
        trained(tiny_folder, config)
    limit = 0
    with pytest.raises(TrainingError, match="memory ran out in step 1 with one row; train on shorter rows"):
        trained(tiny_folder, config, rows=1)


def test_pretended_sharding_is_refused_with_the_reason(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded = property(lambda self: DistributedType.FSDP)
    monkeypatch.setattr(module.Accelerator, "distributed_type", sharded)
    with pytest.raises(ConfigError, match="FSDP, which is not for a packed base: its bytes are buffers"):
        trained(tiny_folder, TrainConfig(steps=1))
