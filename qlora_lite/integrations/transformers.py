"""transformers' Trainer for models that `add_lora_` or `load_adapter_` adapted.

Trainer takes such a model for one whose weights are all trained: each of its checkpoints would be the whole packed
model, under names that nothing reads. Here a checkpoint has the adapter in peft's files in place of the model. The
optimizer, the schedule and the random states beside it are Trainer's own, so a resumed run ends with the same bits.
"""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from qlora_lite.errors import ConfigError, TargetError
from qlora_lite.lora.adapters import lora_layers
from qlora_lite.lora.peft.save_load import load_adapter_, save_adapter
from qlora_lite.patches import patched_attribute
from qlora_lite.training.forward.fuse import fusion_of, without_peft


class AdapterCheckpoints:
    """A base class to put before Trainer, or one of trl's trainers: its checkpoints have adapters only.

        class MyTrainer(AdapterCheckpoints, trl.SFTTrainer): ...

    `save_model`, `resume_from_checkpoint` and `load_best_model_at_end` write and read the adapter in use. The model's
    parameters stay the same objects. Raises TargetError, when the first checkpoint is written, for a model without
    adapters. Models of peft are saved and loaded by Trainer itself, which writes their adapters only.
    """

    model: nn.Module
    state: Any

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if _is_of_peft(self.model):
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        if not lora_layers(self.model):
            raise TargetError("the model has no adapters of add_lora_ or peft to save")
        # A state of the whole model is never made: Trainer hands it on to save_pretrained, which is replaced.
        with patched_attribute(self.model, "save_pretrained", functools.partial(_save_adapter, self.model)):
            super()._save(output_dir, {})  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        if _is_of_peft(model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        else:
            load_adapter_(model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if _is_of_peft(self.model):
            super()._load_best_model()  # type: ignore[misc]
        else:
            load_adapter_(self.model, self.state.best_model_checkpoint)


def _is_of_peft(model: nn.Module) -> bool:
    return without_peft(model) is not model


def _save_adapter(model: nn.Module, folder: str, *, is_main_process: bool = True, **options: object) -> None:
    """In place of `save_pretrained`. Trainer calls it for folders with files of its own, which stay."""
    if not is_main_process:
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix=".adapter.") as temporary:
        save_adapter(model, Path(temporary) / "adapter")
        for file in sorted((Path(temporary) / "adapter").iterdir()):
            os.replace(file, Path(folder) / file.name)


class AdapterTrainer(AdapterCheckpoints, Trainer):  # type: ignore[misc]
    """transformers' Trainer with `AdapterCheckpoints`."""

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """As Trainer's. Raises ConfigError if logits are wanted of a model whose calls with labels have none."""
        fusion = fusion_of(without_peft(self.model))
        has_logits = prediction_loss_only or self.label_smoother is not None or self.compute_loss_func is not None
        if not has_logits and fusion is not None and not fusion.keep_logits and "labels" in inputs:
            raise ConfigError(
                "compute_metrics and predict need logits, and a fused model has none in calls with labels; "
                "fuse_(model, keep_logits=True), or set prediction_loss_only=True"
            )
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
