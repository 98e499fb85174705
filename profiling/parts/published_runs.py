"""Runs that others measured on GPUs and published, beside rehearsals of the same set-ups.

The rows are `data/published_peaks.csv`; its column `source` names the repository and file that each comes from, and
`notes` has the exact bytes and the libraries of the run. A rehearsal stands on fake tensors taken for an accelerator's,
and its storages go through a model of torch's caching allocator, so `allocated` means the same on both sides.

fms-acceleration's recipe (scripts/benchmarks/scenarios.yaml, plugins/accelerated-peft): rank 16 on q, k, v, o with
dropout 0.1, reentrant checkpointing, FlashAttention-2; variants
- `none`: a bfloat16 base, no autocast;
- `baseline-peft-bnb`: NF4 with double quantization, trained by trl: autocast, norms in fp32, embedding and head in
  bfloat16;
- `accelerated-peft-bnb`: the same without casting norms.
Both recorded versions of transformers took the loss with a copy of all logits in fp32 and a second one, shifted by a
token; 4.48 in a function to which the model's bfloat16 logits are lent meanwhile, 4.45 in the model, under whose name
for them the first copy replaced them. Today's does without the second copy. Each set-up is rehearsed with the installed
library's loss (`today`) and with the recorded one written out (`then`).

Nothing here was adjusted to published figures. Only Mistral-7B rows of 4 sequences were looked at while this was
written; rows of 8 sequences and all of PowerLM-3b (`held_aside`) were checked by running it. That first run took 4.48's
loss for PowerLM-3b too and came out 8 to 11 % above; what 4.45 does was read in its source after that.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from parts.peft_steps import PeftWork, skeleton, stand_in_, take_steps
from qlora_lite.planning.cuda_allocator import Replay, replay
from qlora_lite.planning.rehearsal import rehearsal

PUBLISHED = Path(__file__).resolve().parent / "data" / "published_peaks.csv"
GB, GIB = 10**9, 1 << 30
STEP_PHASES = ("forward", "backward", "optimizer")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
QUERY_VALUE = ("q_proj", "v_proj")

LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
SHAPES: dict[str, dict[str, Any]] = {
    # Its sliding window is as long as the rows here, so it hides nothing; None lets attention do without a mask.
    "mistralai/Mistral-7B-v0.1": {
        **LLAMA_7B,
        "model_type": "mistral",
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "sliding_window": None,
    },
    "ibm/PowerLM-3b": {
        "model_type": "granite",
        "vocab_size": 49152,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 40,
        "num_attention_heads": 36,
        "num_key_value_heads": 36,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    "Llama-2-7b": LLAMA_7B,
    "llama-7b": LLAMA_7B,
    "Llama-2-13b": {
        **LLAMA_7B,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
}
RECIPES = {
    "none": PeftWork(format="none", casting="none"),
    "baseline-peft-bnb": PeftWork(casting="norms", autocast=True),
    "accelerated-peft-bnb": PeftWork(casting="none", autocast=True),
}
FMS = "foundation-model-stack/fms-acceleration"
LITGPT = "Lightning-AI/litgpt"
BLOG = "huggingface/blog"
T4_BYTES = int(14.56 * GIB)


@dataclass(frozen=True)
class Run:
    """A published row; peak and end (allocated when training is over) in bytes, None where they are not given."""

    source: str
    model: str
    variant: str
    format: str
    rows: int
    tokens: int | None
    checkpointing: bool
    transformers: str | None
    peak: int | None
    end: int | None
    verdict: str | None

    @property
    def held_aside(self) -> bool:
        """Whether nobody looked at it before the first run of this script."""
        return FMS in self.source and (self.rows == 8 or self.model == "ibm/PowerLM-3b")


def _note(notes: str, name: str) -> str | None:
    found = re.search(rf"{name}=([^;]+)", notes)
    return None if found is None else found[1]


def published_runs() -> Iterator[Run]:
    """The rows of the file, in its order."""
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            exact, end = _note(row["notes"], "peak_bytes"), _note(row["notes"], "end_alloc_bytes")
            rounded = int(float(row["peak_GB"]) * GB) if row["peak_GB"] else None
            yield Run(
                source=row["source"],
                model=row["model"].split()[0],
                variant=_note(row["notes"], "variant") or "",
                format=row["quant"],
                rows=int(row["batch"]),
                tokens=int(row["seq"]) if row["seq"] else None,
                checkpointing=row["grad_ckpt"] == "true",
                transformers=found[1] if (found := re.search(r"transformers (\d+\.\d+)", row["notes"])) else None,
                peak=int(exact) if exact else rounded,
                end=int(end) if end else None,
                verdict=_note(row["notes"], "verdict"),
            )


def _shifted_loss(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    """The loss of transformers 4.45 to 4.48: all logits to fp32, then a copy of them without the last token."""
    logits = logits.float()
    shifted = logits[..., :-1, :].contiguous()
    return nn.functional.cross_entropy(shifted.view(-1, vocab_size), labels[..., 1:].contiguous().view(-1))


def _give_loss_of_(model: Any, transformers: str | None) -> None:
    """Gives a model the loss of a recorded version of transformers."""
    model.loss_function = _shifted_loss
    if transformers == "4.45":
        model.get_output_embeddings().register_forward_hook(lambda head, given, logits: logits.float())


def replayed(run: Run, work: PeftWork, recorded_loss: bool, layers: int | None = None) -> Replay:
    """What the caching allocator does in the rehearsal of a set-up, of the model's number of layers or another."""
    from transformers import AutoConfig

    settings = SHAPES[run.model] if layers is None else {**SHAPES[run.model], "num_hidden_layers": layers}
    config = AutoConfig.for_model(**settings)
    if BLOG in run.source:
        config._attn_implementation = "eager"  # as transformers had it then
    model = skeleton(config, work.format)
    if recorded_loss:
        _give_loss_of_(model, run.transformers)
    with rehearsal(accelerator=True) as profiler:
        held = take_steps(stand_in_(model), work, profiler)
    del held  # not before the trace was closed: its end is what a trainer still holds
    assert profiler.trace is not None
    return replay(profiler.trace.timeline())


def steps_peak(found: Replay) -> int:
    """The most bytes that were allocated during steps."""
    return max(found.by_phase[phase].allocated for phase in STEP_PHASES)


def work_of(run: Run) -> PeftWork | None:
    """The set-up of a run as far as it is known; None where there is nothing to rehearse."""
    if run.model not in SHAPES or run.tokens is None:
        return None
    if FMS in run.source:
        if run.variant not in RECIPES:
            return None
        work = replace(RECIPES[run.variant], targets=ATTENTION, checkpointing="reentrant", dropout=0.1)
    elif LITGPT in run.source:
        work = PeftWork(format=run.format, rank=8, targets=QUERY_VALUE, checkpointing="none", casting="none")
    elif BLOG in run.source and run.format != "int8":
        checkpointing = "reentrant" if run.checkpointing else "none"
        work = PeftWork(format=run.format, targets=QUERY_VALUE, checkpointing=checkpointing, autocast=True)
    else:
        return None
    return replace(work, rows=run.rows, tokens=run.tokens)


def not_known(run: Run) -> str:
    """What stands between a row and a rehearsal of its set-up."""
    if "foak" in run.variant:
        return "kernels of their own (fused LoRA, loss, norms, rotary), not installed here"
    if LITGPT in run.source:
        return "their model code (fused qkv, loss in chunks), adapters' dtype; bitsandbytes 0.41 kept inputs too"
    if BLOG in run.source and run.format == "int8":
        return "rank, targets; 8-bit layers take another way on a GPU than on a CPU"
    if BLOG in run.source:
        return "rank (16 assumed), targets (q, v assumed), what the process takes past the allocator"
    if run.tokens is None or "torchtune" in run.source:
        return "tokens of the rows, or torchao's and torch.compile's kernels; reserved or active, not allocated"
    return "" if run.model in SHAPES else "the model's code"
