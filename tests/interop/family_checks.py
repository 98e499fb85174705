"""The checks of families.py: one small model through loading, training, saving, exporting and reloading.

Each check compares with plain transformers, with peft, or with what the model computed before. It ends in one of
`STATUSES`: equal, refused (a sentence of this package, which is kept), different, or failed (any other exception).
Checks that need the result of one that did not end well are left out. A refusal that names the setting to change is
followed once; the setting is then the note of the result.
"""

from __future__ import annotations

import ast
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from family_configs import VOCABULARY, WHOLE, WHY_NOT_BUILT
from family_models import build
from qlora_lite import (
    LoraConfig,
    QuantConfig,
    TrainConfig,
    add_lora_,
    export_merged,
    load_adapter_,
    load_quantized,
    save_adapter,
    train,
)
from qlora_lite.architecture import input_embedding, is_reversible
from qlora_lite.checkpoints import TensorFiles
from qlora_lite.errors import ConfigError, QLoRAError, TargetError, TrainingError
from qlora_lite.export import merge_checkpoint, save_quantized
from qlora_lite.lora.adapters import lora_layers
from qlora_lite.lora.peft import check_compatibility, describe_adapter
from qlora_lite.lora.peft.compatibility import PEFT

EQUAL, REFUSED, DIFFERENT, FAILED, NOT_BUILT = "equal", "refused", "different", "failed", "not built"
STATUSES = (EQUAL, REFUSED, DIFFERENT, FAILED, NOT_BUILT)
FP32, PLAIN = torch.float32, QuantConfig(format="none")
ROWS, TOKENS = 2, 16
# Two examples in a row of as many tokens.
FIRST, SECOND = 9, 7

CHECKS = ("plain", "half", "packed", "trained", "adapter", "export", "disk", "folder", "rows", "peft")
# The check that has to end well before another one can be made.
NEEDS = {
    **dict.fromkeys(("trained", "adapter", "export", "folder"), "packed"),
    "disk": "export",
    "rows": "trained",
    "peft": "adapter",
}


@dataclass(frozen=True)
class Result:
    """How a check of a family ended, and why. note: the setting that a refusal named, and that was followed."""

    family: str
    check: str
    status: str
    why: str = ""
    note: str = ""


class Different(Exception):
    """What was compared is not equal."""


class Refused(Exception):
    """This package says beforehand that something does not work, without raising."""


def named_setting(error: QLoRAError, setting: str) -> list[str]:
    """Returns the value that an error gives for a setting. Raises the error if it gives none."""
    found = re.search(rf"{setting}=(\[[^]]*\])", str(error))
    if found is None:
        raise error
    return list(ast.literal_eval(found[1]))


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Returns the logits in fp32."""
    return model.eval()(input_ids=ids, use_cache=False).logits.float()  # type: ignore[no-any-return]


def check_close(what: str, one: Tensor, other: Tensor, tolerance: float) -> None:
    """Raises Different if the largest difference is above this share of the largest value, or a value is NaN."""
    if one.shape != other.shape:
        raise Different(f"{what}: {tuple(one.shape)} and {tuple(other.shape)}")
    share = float((one - other).abs().max()) / max(1e-9, float(other.abs().max()))
    if not share <= tolerance:
        raise Different(f"{what} differ by {share:.1e} of the largest")


def check_tensors(ours: nn.Module, theirs: nn.Module) -> None:
    """Raises Different unless parameters and buffers are equal in name, dtype and every bit."""
    here, there = (dict(model.named_parameters()) | dict(model.named_buffers()) for model in (ours, theirs))
    if here.keys() != there.keys():
        raise Different(f"tensors of one model only: {sorted(here.keys() ^ there.keys())[:4]}")
    dtypes = [f"{name} {here[name].dtype}" for name in here if here[name].dtype != there[name].dtype]
    values = [name for name in here if not torch.equal(*(torch.nan_to_num(side[name]) for side in (here, there)))]
    if dtypes or values:
        raise Different(f"other dtypes {dtypes[:4]}, other values {values[:4]}")


def reference_loss(model: Any, ids: Tensor) -> Tensor:
    """Returns the cross-entropy of the next token, by plain torch and autograd."""
    logits = model(input_ids=ids, use_cache=False).logits.float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def first_step(model: nn.Module, batch: dict[str, Tensor], checkpointing: str) -> tuple[float, dict[str, Tensor]]:
    """Returns the loss of the first step of `train`, and the gradients that the optimizer got."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    caught: dict[str, Tensor] = {}

    def keep(optimizer: Any, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            caught.update({names[id(p)]: p.grad.detach().clone() for p in group["params"] if p.grad is not None})

    handle = register_optimizer_step_pre_hook(keep)
    try:
        config = TrainConfig(steps=1, learning_rate=1e-3, max_grad_norm=None, checkpointing=checkpointing)
        result = train(model, [batch], config, progress=False)
    finally:
        handle.remove()
    return result.losses[0], caught


def check_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raises Different if a gradient differs by more than 1% of its norm; tiny ones by 1e-6 of the norm of all."""
    total = torch.stack([grad.norm() for grad in expected.values()]).norm()
    for name, grad in expected.items():
        if name not in found:
            raise Different(f"{name} got no gradient")
        share = float((found[name] - grad).norm() / torch.maximum(grad.norm(), 1e-4 * total))
        if not share < 1e-2:
            raise Different(f"the gradient of {name} differs by {share:.1e} of its norm")


class Checks:
    """The checks of a family. Each method whose name is in `CHECKS` is one of them; it returns the note, if any."""

    def __init__(self, family: str, work: Path) -> None:
        self.family, self.work, self.source = family, work, work / "source"
        self.quant = QuantConfig()

    def theirs(self, folder: Path, dtype: torch.dtype = FP32) -> Any:
        """Returns transformers' model. Raises Different if it misses tensors, or cannot place some that it needs."""
        kind = getattr(transformers, WHOLE.get(self.family, "AutoModelForCausalLM"))
        model, found = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        lost = {key: sorted(map(str, names))[:4] for key, names in found.items() if names and key != "unexpected_keys"}
        if lost:
            raise Different(f"transformers reports {lost}")
        return model.eval()

    def built(self) -> None:
        """Builds the checkpoint, and the logits that transformers computes. Any exception is transformers' own."""
        build(self.family, self.source)
        model = self.theirs(self.source)
        vocabulary = min(VOCABULARY, getattr(model.config.get_text_config(), "vocab_size", None) or VOCABULARY)
        self.ids = torch.randint(12, vocabulary, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
        self.expected = logits_of(model, self.ids)

    def plain(self) -> None:
        """Unpacked in fp32, every tensor is transformers', and the logits are."""
        ours = load_quantized(self.source, PLAIN, dtype=FP32)
        check_tensors(ours, self.theirs(self.source))
        check_close("logits", logits_of(ours, self.ids), self.expected, 1e-4)

    def half(self) -> None:
        """Unpacked in bf16, every tensor is transformers', in dtype and value."""
        ours = load_quantized(self.source, PLAIN, dtype=torch.bfloat16)
        check_tensors(ours, self.theirs(self.source, torch.bfloat16))

    def packed(self) -> str:
        """Packed, the model runs, and adapters go on all of its linear layers."""
        note = ""
        try:
            self.model = load_quantized(self.source, self.quant, dtype=FP32)
        except TargetError as error:
            skips = named_setting(error, "skip_modules")
            note, self.quant = f"skip_modules={skips}", QuantConfig(skip_modules=tuple(skips))
            self.model = load_quantized(self.source, self.quant, dtype=FP32)
        if not logits_of(self.model, self.ids).isfinite().all():
            raise Different("logits of the packed model are not finite")
        self._adapt(None)
        return note

    def _adapt(self, without: list[str] | None) -> None:
        add_lora_(self.model, LoraConfig(rank=4, alpha=8, exclude_modules=without))
        generator = torch.Generator().manual_seed(3)
        for layer in lora_layers(self.model).values():  # with B = 0 the gradient of A is zero
            nn.init.normal_(layer.lora_B, std=0.02, generator=generator)
        self.adapted = logits_of(self.model, self.ids)

    def _reference(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and the gradients of plain torch in training mode."""
        self.model.train()
        embedding = input_embedding(self.model)
        with ExitStack() as stack:
            if is_reversible(self.model) and embedding is not None:  # such layers need inputs that require a gradient
                stack.enter_context(embedding.register_forward_hook(lambda *given: given[-1].requires_grad_()))
            loss = reference_loss(self.model, self.ids)
        loss.backward()
        grads = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return loss.detach(), grads

    def trained(self) -> str:
        """Loss and gradients of a step are those of cross-entropy and autograd, with blocks recomputed and without."""
        without: list[str] = []
        for _ in range(3):  # layers that no block uses are listed first, then those that one block does not use
            try:
                self._train("full")
                break
            except TrainingError as error:
                without += named_setting(error, "exclude_modules")
                self.model = load_quantized(self.source, self.quant, dtype=FP32)
                self._adapt(without)
        self._train("none")
        return f"exclude_modules={without}" if without else ""

    def _train(self, checkpointing: str) -> None:
        loss, expected = self._reference()
        start = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
        found, grads = first_step(self.model, {"input_ids": self.ids, "labels": self.ids.clone()}, checkpointing)
        with torch.no_grad():
            for name, value in start.items():
                self.model.get_parameter(name).copy_(value)
        self.model.zero_grad(set_to_none=True)
        check_close("loss", torch.tensor(found), loss, 1e-3)
        check_gradients(grads, expected)

    def rows(self) -> None:
        """The loss of two examples packed into a row is that of both by themselves."""
        self.model.eval()
        parts = self.ids[:1, :FIRST], self.ids[1:, :SECOND]
        with torch.no_grad():
            losses = [float(reference_loss(self.model, part)) * (part.shape[1] - 1) for part in parts]
        labels = torch.cat(parts, dim=1)
        labels[0, FIRST] = -100
        positions = torch.cat([torch.arange(FIRST), torch.arange(SECOND)])[None]
        batch = {"input_ids": torch.cat(parts, dim=1), "position_ids": positions, "labels": labels}
        found, _ = first_step(self.model, batch, "full")
        check_close("loss", torch.tensor(found), torch.tensor(sum(losses) / (FIRST + SECOND - 2)), 1e-3)

    def peft(self) -> None:
        """peft loads the adapter and computes the same logits, or `inspect` says that it does not."""
        from peft import PeftModel

        verdict = check_compatibility(describe_adapter(self.work / "adapter"))[PEFT]
        ours = load_quantized(self.source, PLAIN, dtype=FP32)
        load_adapter_(ours, self.work / "adapter")
        expected = logits_of(ours, self.ids)
        try:
            theirs = PeftModel.from_pretrained(self.theirs(self.source), str(self.work / "adapter"))
            check_close("logits in peft", logits_of(theirs, self.ids), expected, 1e-4)
        except Exception as error:
            if verdict.accepted:
                raise Different(f"peft was to accept it: {type(error).__name__}: {error}") from error
            raise Refused("; ".join(verdict.reasons)) from error
        if not verdict.accepted:
            raise Different(f"peft computes the same, and was not to: {'; '.join(verdict.reasons)}")

    def adapter(self) -> None:
        """Saved and loaded into a fresh model, the adapter gives the same logits."""
        save_adapter(self.model, self.work / "adapter")
        fresh = load_quantized(self.source, self.quant, dtype=FP32)
        load_adapter_(fresh, self.work / "adapter")
        check_close("logits", logits_of(fresh, self.ids), self.adapted, 1e-6)

    def export(self) -> None:
        """The export gives transformers, and `load_quantized`, the logits of the adapted model."""
        export_merged(self.model, self.work / "merged", dtype=FP32)
        ours = load_quantized(self.work / "merged", PLAIN, dtype=FP32)
        check_close("logits", logits_of(ours, self.ids), self.adapted, 1e-3)
        theirs = self.theirs(self.work / "merged")
        check_close("logits in transformers", logits_of(theirs, self.ids), self.adapted, 1e-3)

    def disk(self) -> None:
        """Merged on disk, the files have the tensors of the export in memory."""
        merge_checkpoint(self.source, self.work / "adapter", self.work / "disk", self.quant, FP32, load_dtype=FP32)
        one, other = (dict(TensorFiles(self.work / name).items()) for name in ("merged", "disk"))
        if one.keys() != other.keys() or not all(torch.equal(tensor, other[name]) for name, tensor in one.items()):
            raise Different("the merge on disk has other tensors than the one in memory")

    def folder(self) -> str:
        """Written as a packed folder and loaded again, the model gives the same logits."""
        note, plain = "", load_quantized(self.source, self.quant, dtype=FP32)
        try:
            save_quantized(plain, self.work / "packed")
        except ConfigError as error:
            skips = named_setting(error, "skip_modules")
            note = f"skip_modules={skips}"
            plain = load_quantized(self.source, QuantConfig(skip_modules=tuple(skips)), dtype=FP32)
            save_quantized(plain, self.work / "packed")
        again = load_quantized(self.work / "packed", dtype=FP32)
        check_close("logits", logits_of(again, self.ids), logits_of(plain, self.ids), 1e-6)
        return note


def _ended(family: str, check: str, act: Callable[[], str | None]) -> Result:
    try:
        note = act()
    except (QLoRAError, Refused) as error:
        return Result(family, check, REFUSED, str(error))
    except Different as error:
        return Result(family, check, DIFFERENT, str(error))
    except Exception as error:  # what nobody may see
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return Result(family, check, FAILED, f"{type(error).__name__}: {error} ({where})")
    return Result(family, check, EQUAL, note=note or "")


def results(family: str, work: Path) -> Iterator[Result]:
    """Yields the results of a family's checks."""
    checks = Checks(family, work)
    try:
        checks.built()
    except Exception as error:  # transformers' own
        said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        yield Result(family, "built", NOT_BUILT, WHY_NOT_BUILT.get(family, said))
        return
    ended: dict[str, str] = {}
    for check in CHECKS:
        if check not in NEEDS or ended.get(NEEDS[check]) == EQUAL:
            result = _ended(family, check, getattr(checks, check))
            ended[check] = result.status
            yield result
