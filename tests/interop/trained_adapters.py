"""The two sides of matrix.py: models, training and files of peft, and those of this library.

Both sides have the same weights: small random ones that bfloat16 represents exactly. One side packs them with
bitsandbytes through transformers, the other with `load_quantized`, to the same codes. Every forward pass runs in
training mode with gradients, because bitsandbytes' 4-bit layers re-pack themselves in any other mode
(see qlora_lite/quantization/from_bitsandbytes.py).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cases import FAMILIES, TOKENS_TRAINED, VARIANTS, Subject
from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized
from qlora_lite.lora.peft.keys import TENSOR_FILE
from qlora_lite.lora.peft.options import CONFIG_FILE

STEPS = 3
LEARNING_RATE = 2e-2
SHAPE = (2, 12)
# transformers does not pack stacks of experts, so this side does not either.
SKIPPED = ("lm_head", "experts")


def batch() -> Tensor:
    """Returns token ids, among them those whose rows are trained."""
    ids = torch.arange(SHAPE[0] * SHAPE[1]).reshape(SHAPE) * 7 % 61
    ids[0, : len(TOKENS_TRAINED)] = torch.tensor(TOKENS_TRAINED)
    return ids


def logits(model: Any) -> Tensor:
    """Returns fp32 logits of the batch, in training mode and with gradients. There is no dropout."""
    with torch.enable_grad():
        return model.train()(input_ids=batch()).logits.detach().float()


def train_(model: Any) -> None:
    """Takes a few steps of AdamW on the trainable parameters."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    model.train()
    for _ in range(STEPS):
        model(input_ids=batch(), labels=batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class Workshop:
    """The base models of both sides, by (family, base, dtype). Each is made once and returned as a copy."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[tuple[object, ...], Any] = {}

    def checkpoint(self, family: str) -> Path:
        """Returns the folder of a family's checkpoint, whose weights bfloat16 represents exactly."""
        import transformers

        folder = self.folder / family
        if not folder.is_dir():
            torch.manual_seed(0)
            settings = FAMILIES[family]
            config = getattr(transformers, settings.config)(**settings.sizes)
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    # Norms and biases would be ones and zeros, which hides a side that does not read them.
                    if parameter.dim() == 1:
                        parameter.add_(torch.randn_like(parameter) / 10)
                    if "expert" not in name or parameter.dim() < 3:
                        parameter.copy_(parameter.bfloat16())
                    else:
                        parameter.copy_((parameter * 2).bfloat16())
            model.save_pretrained(folder)
        return folder

    def theirs(self, family: str, base: str, dtype: torch.dtype = torch.float32) -> Any:
        """Returns the model of transformers, packed by bitsandbytes."""
        import transformers

        def make() -> Any:
            quantization = None
            if base == "int8":
                quantization = transformers.BitsAndBytesConfig(load_in_8bit=True)
            elif base == "nf4":
                quantization = transformers.BitsAndBytesConfig(
                    load_in_4bit=True,
                    bnb_4bit_quant_type="nf4",
                    bnb_4bit_use_double_quant=True,
                    bnb_4bit_compute_dtype=dtype,
                )
            load = transformers.AutoModelForCausalLM.from_pretrained
            return load(self.checkpoint(family), dtype=dtype, quantization_config=quantization)

        return self._copy(("theirs", family, base, dtype), make)

    def ours(self, family: str, base: str, dtype: torch.dtype = torch.float32) -> Any:
        """Returns the model of `load_quantized`."""

        def make() -> Any:
            skipped = SKIPPED if FAMILIES[family].stacks and base != "none" else None
            return load_quantized(self.checkpoint(family), QuantConfig(format=base, skip_modules=skipped), dtype=dtype)

        return self._copy(("ours", family, base, dtype), make)

    def _copy(self, key: tuple[object, ...], make: Any) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return copy.deepcopy(self._made[key])


def peft_trained(workshop: Workshop, subject: Subject, folder: Path) -> Tensor:
    """Trains an adapter with peft, saves it in `folder` for the plain base, and returns the logits of the model.

    Where peft changed the base at the start (`converted`), the adapter is converted as its documentation describes,
    with the initial adapter.
    """
    import peft

    torch.manual_seed(1)
    base = workshop.theirs(subject.family, subject.base)
    model = peft.get_peft_model(base, peft.LoraConfig(**subject.peft_options()))
    converted = VARIANTS[subject.variant].converted
    initial = folder.with_name(f"{folder.name}_begun")
    if converted:
        model.save_pretrained(initial)
    train_(model)
    found = logits(model)
    options = {"path_initial_model_for_weight_conversion": str(initial)} if converted else {}
    model.save_pretrained(folder, **options)
    return found


def peft_loaded(
    workshop: Workshop,
    subject: Subject,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype = torch.float32,
) -> Any:
    """Loads the adapter of this folder with peft, in `adapter_dtype`, into a fresh base."""
    import peft

    base = workshop.theirs(subject.family, subject.base, dtype)
    wide = adapter_dtype == torch.float32
    return peft.PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=wide)


def our_trained(workshop: Workshop, subject: Subject) -> tuple[Any, Tensor]:
    """Returns a model that this library adapted and trained, and its logits."""
    torch.manual_seed(2)
    model = workshop.ours(subject.family, subject.base)
    add_lora_(model, LoraConfig(**subject.our_options()))
    train_(model)
    return model, logits(model)


def disturb_(folder: Path, what: str) -> None:
    """Changes one `value` of a saved adapter, or its `alpha`, so that a model that loads it computes something else."""
    if what == "alpha":
        config = json.loads((folder / CONFIG_FILE).read_text())
        config["lora_alpha"] *= 2
        config["alpha_pattern"] = {pattern: 2 * alpha for pattern, alpha in config["alpha_pattern"].items()}
        (folder / CONFIG_FILE).write_text(json.dumps(config))
        return
    tensors = load_file(folder / TENSOR_FILE)
    # A value of a linear layer's A: every subject has one, and it affects every output of the layer.
    key = next(key for key in sorted(tensors) if key.endswith(".lora_A.weight"))
    tensors[key].view(-1)[0] += 5
    save_file(tensors, folder / TENSOR_FILE, metadata={"format": "pt"})


def saved_values(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns tensors and configuration of a saved adapter."""
    return load_file(folder / TENSOR_FILE), json.loads((folder / CONFIG_FILE).read_text())
