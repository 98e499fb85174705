"""The model card of an adapter: its base, its settings, how it was trained, and how it is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from qlora_lite import architecture
from qlora_lite.checkpoints.base_identity import PACKED_HASH_KEY
from qlora_lite.checkpoints.repository.model_card import ModelCard, display_name, rows
from qlora_lite.errors import listing
from qlora_lite.lora.variants import variant_of
from qlora_lite.quantization.formats import UNPACKED
from qlora_lite.quantization.packed_weight import PackedWeight
from qlora_lite.tasks import CAUSAL_LM, task_of

MOST_NAMES = 12
# What the hub calls a task.
PIPELINES = {
    "causal-lm": "text-generation",
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
    "masked-lm": "fill-mask",
    "embedding": "feature-extraction",
    "image-text-to-text": "image-text-to-text",
}
USE = """## Use

With qlora_lite; the folder is that of these files:

```python
from qlora_lite import QuantConfig, load_adapter_, load_quantized

model = load_quantized("{base}", QuantConfig(format="{format}"){task})
load_adapter_(model, "path/to/this/folder")
```

With peft, where the id of this repository may stand for the folder:

```python
from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained("{base}"{labels})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""
USE_REPACKED = """## Use

LoftQ packed the base of this adapter anew. It belongs to the checkpoint that `save_quantized` wrote of that base, and
to no other:

```python
from qlora_lite import load_adapter_, load_quantized

model = load_quantized("path/to/the/packed/base")
load_adapter_(model, "path/to/this/folder")
```
"""


@dataclass(frozen=True)
class TrainingRecord:
    """What a model card says of a run.

    tokens: of all steps, padding included. learning_rate: the highest, of A. first_loss, last_loss: of a step.
    held_out: the loss of held-out examples before and after the run; None if there were none.
    """

    steps: int
    tokens: int
    learning_rate: float
    first_loss: float
    last_loss: float
    held_out: tuple[float, float] | None = None

    def in_rows(self) -> str:
        """Returns a table for the card."""
        before, after = self.held_out or (None, None)
        return rows(
            {
                "optimizer steps": self.steps,
                "tokens, padding included": self.tokens,
                "peak learning rate": self.learning_rate,
                "loss of the first step": self.first_loss,
                "loss of the last step": self.last_loss,
                "held-out loss before": before,
                "held-out loss after": after,
            }
        )


def _named(value: object) -> str | None:
    """Returns names in the form of a list of peft's config, cut to the first ones."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return listing(map(str, value), MOST_NAMES) if value else None
    return None if value is None else str(value)


def _base_format(model: nn.Module) -> str:
    """Returns the format of most packed weights of a model."""
    formats = Counter(module.format for module in model.modules() if isinstance(module, PackedWeight))
    return formats.most_common(1)[0][0] if formats else UNPACKED


def _settings(config: Mapping[str, object], format: str) -> str:
    use_rslora = bool(config.get("use_rslora"))
    several = {name: bool(config.get(f"{name}_pattern")) for name in ("rank", "alpha")}
    return rows(
        {
            "base packed as": "not packed" if format == UNPACKED else format,
            "variant": variant_of(config).name,
            "rank": f"{config['r']}{', others by rank_pattern' if several['rank'] else ''}",
            "alpha": f"{config['lora_alpha']}{', others by alpha_pattern' if several['alpha'] else ''}",
            "scaling": "alpha / sqrt(rank)" if use_rslora else "alpha / rank",
            "dropout": str(config.get("lora_dropout")),
            "target_modules": _named(config.get("target_modules")),
            "target_parameters": _named(config.get("target_parameters")),
            "modules_to_save": _named(config.get("modules_to_save")),
            "bias": config.get("bias"),
        }
    )


def _use(model: nn.Module, base: str, format: str) -> str:
    task = task_of(model)
    count = architecture.config_value(getattr(model, "config", None), "num_labels")
    count = count if task.has_labels else None
    named = "" if task is CAUSAL_LM else f', task="{task.name}"' + (f", labels={count}" if count else "")
    labels = f", num_labels={count}" if count else ""
    return USE.format(base=base, format=format, task=named, auto_class=task.auto_class, labels=labels)


def adapter_card(model: nn.Module, config: Mapping[str, object], training: TrainingRecord | None) -> ModelCard:
    """Returns the card of an adapter. config: the contents of its adapter_config.json."""
    named = config.get("base_model_name_or_path")
    base, format = display_name(None if named is None else str(named)), _base_format(model)
    parts = [
        f"A LoRA adapter for {base or 'its base model'}, trained with qlora_lite. The weights of the base are not part "
        f"of it.",
        f"## Settings\n\n{_settings(config, format)}",
        *([] if training is None else [f"## Training\n\n{training.in_rows()}"]),
        USE_REPACKED if PACKED_HASH_KEY in config else _use(model, base or "path/to/the/base", format),
    ]
    pipeline = PIPELINES.get(task_of(model).name) if architecture.is_transformers_model(model) else None
    return ModelCard(
        title=f"LoRA adapter for {base}" if base else "LoRA adapter",
        base_model=base,
        relation="adapter",
        library="peft",
        tags=["lora"],
        body="\n\n".join(parts),
        more={"pipeline_tag": pipeline},
    )
