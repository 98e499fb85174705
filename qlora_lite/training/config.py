"""TrainConfig: the settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from qlora_lite.checks import byte_count, is_count, is_finite, require

OPTIMIZERS = ("adamw", "adamw8bit")
COSINE, LINEAR, CONSTANT = "cosine", "linear", "constant"
SCHEDULES = (COSINE, LINEAR, CONSTANT)
NONE, FULL = "none", "full"
CHECKPOINTING = (NONE, FULL)
LOSS, EXACT_MATCH = "loss", "exact_match"
BEST_BY = (LOSS, EXACT_MATCH)
SEED_LIMIT = 2**63  # of torch's generators


def checkpointing_named(text: str) -> str | int:
    """Returns `"full"` and `"none"` as they are, and the bytes of a size such as `"300MiB"` or `"500000000"`.

    Raises ConfigError for other texts.
    """
    if text in CHECKPOINTING:
        return text
    return byte_count(f"checkpointing must be one of {', '.join(CHECKPOINTING)}, or", text)


def check_checkpointing(checkpointing: object) -> None:
    """Raises ConfigError for what is neither `full`, `none`, nor a number of bytes."""
    known = is_count(checkpointing, 1) or checkpointing in CHECKPOINTING
    require(known, f"checkpointing must be one of {', '.join(CHECKPOINTING)}, or a number of bytes", checkpointing)


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run.

    steps: optimizer steps.
    learning_rate: the peak, which the learning rate rises to linearly during the warm-up.
    schedule: the learning rate after the warm-up: `cosine` (a half cosine down to `min_learning_rate`), `linear` (a
        line down to it) or `constant`.
    warmup_steps, warmup_ratio: the steps of the warm-up, as a number or as a share of `steps`, rounded up.
    min_learning_rate: the learning rate at the end, of A, as `learning_rate` is.
    weight_decay: of AdamW, for all matrices: A, B, `modules_to_save` and token rows. Vectors are not decayed: biases,
        weights of norms, a variant's parameters (lora/variants.py). transformers' Trainer decays the last; where they
        scale the base, that would pull the base itself towards 0.
    gradient_accumulation: batches of a step.
    max_grad_norm: limit of the joint 2-norm of all gradients, which are scaled down to it; None does not clip.
    lora_plus_ratio: the learning rate of B, and of vectors, divided by that of A (LoRA+, arXiv:2402.12354, which
        proposes 16 with a smaller `learning_rate`). Other matrices have the learning rate of A, as in peft.
    optimizer: `adamw` (fp32 states) or `adamw8bit` (bitsandbytes' blockwise 8-bit states).
    checkpointing: activation checkpointing. `full` stores only the inputs of each block for backward and recomputes the
        rest. `none` stores matrix products and attention of all blocks. A number of bytes stores attention outputs,
        and then whole blocks, as many as fit: it limits the peak of live tensors above the model's own bytes.
    neftune_noise_alpha: NEFTune (arXiv:2310.05914): during training, noise from [-a, a] is added to the embeddings of
        tokens, a = alpha / sqrt(tokens of a row * features). None adds none.
    seed: `train` calls `torch.manual_seed(seed)` first; dropout and noise follow from it.
    save_steps: steps between two checkpoints in the output folder; the last step writes one too. None writes one only
        when a signal stops the run.
    keep_last, keep_best: checkpoints to keep: the newest `keep_last` (None: all), and of the others the best
        `keep_best`; without `eval_steps`, those with the lowest mean loss since the checkpoint before.
    eval_steps: steps between two evaluations of held-out batches. With any number the adapter of the best one is kept
        in the output folder. None evaluates before the first step and after the last one only.
    patience: the run stops early when so many evaluations in a row were not better than the best one; None never.
    best_by: which evaluation is better: `loss` (with the lower held-out loss) or `exact_match` (with the higher score
        of this name, which `evaluate` of `train` returns; of equal ones, with the lower held-out loss).
    """

    steps: int = 100
    learning_rate: float = 2e-4
    schedule: str = COSINE
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    min_learning_rate: float = 0.0
    weight_decay: float = 0.0
    gradient_accumulation: int = 1
    max_grad_norm: float | None = 1.0
    lora_plus_ratio: float = 1.0
    optimizer: str = "adamw"
    checkpointing: str | int = "full"
    neftune_noise_alpha: float | None = None
    seed: int = 0
    save_steps: int | None = None
    keep_last: int | None = 2
    keep_best: int = 0
    eval_steps: int | None = None
    patience: int | None = None
    best_by: str = LOSS

    def __post_init__(self) -> None:
        require(is_count(self.steps, 1), "steps must be an integer of at least 1", self.steps)
        self._check_learning_rates()
        decay = self.weight_decay
        require(is_finite(decay) and decay >= 0, "weight_decay must be a finite number of at least 0", decay)
        accumulation = self.gradient_accumulation
        require(is_count(accumulation, 1), "gradient_accumulation must be an integer of at least 1", accumulation)
        norm = self.max_grad_norm
        require(norm is None or (is_finite(norm) and norm > 0), "max_grad_norm must be None or above 0", norm)
        require(self.optimizer in OPTIMIZERS, f"optimizer must be one of {', '.join(OPTIMIZERS)}", self.optimizer)
        check_checkpointing(self.checkpointing)
        alpha = self.neftune_noise_alpha
        require(alpha is None or (is_finite(alpha) and alpha > 0), "neftune_noise_alpha must be None or above 0", alpha)
        seed = self.seed
        require(is_count(seed, 0) and seed < SEED_LIMIT, f"seed must be an integer in [0, {SEED_LIMIT})", seed)
        saving, last, best = self.save_steps, self.keep_last, self.keep_best
        require(saving is None or is_count(saving, 1), "save_steps must be None or an integer of at least 1", saving)
        require(last is None or is_count(last, 1), "keep_last must be None or an integer of at least 1", last)
        require(is_count(best, 0), "keep_best must be an integer of at least 0", best)
        self._check_evaluations()

    def _check_evaluations(self) -> None:
        every, patience, saving = self.eval_steps, self.patience, self.save_steps
        require(every is None or is_count(every, 1), "eval_steps must be None or an integer of at least 1", every)
        require(
            patience is None or is_count(patience, 1), "patience must be None or an integer of at least 1", patience
        )
        require(patience is None or every is not None, "patience counts evaluations; give eval_steps too", patience)
        require(self.best_by in BEST_BY, f"best_by must be one of {', '.join(BEST_BY)}", self.best_by)
        chooses = self.best_by == LOSS or every is not None
        require(chooses, "best_by chooses among evaluations; give eval_steps too", self.best_by)
        if self.keep_best and every is not None and saving is not None:
            wanted = f"keep_best goes by evaluations, so save_steps must be a multiple of eval_steps, {every}"
            require(saving % every == 0, wanted, saving)

    def _check_learning_rates(self) -> None:
        rate, ratio = self.learning_rate, self.lora_plus_ratio
        largest = torch.finfo(torch.float32).max / 100  # AdamW divides it by 1 - beta
        require(is_finite(rate) and 0 < rate <= largest, "learning_rate must be a finite number above 0", rate)
        require(is_finite(ratio) and ratio >= 1, "lora_plus_ratio must be a finite number of at least 1", ratio)
        require(rate * ratio <= largest, f"lora_plus_ratio must be at most {largest / rate:g} with this rate", ratio)
        require(self.schedule in SCHEDULES, f"schedule must be one of {', '.join(SCHEDULES)}", self.schedule)
        steps, share, least = self.warmup_steps, self.warmup_ratio, self.min_learning_rate
        require(is_count(steps, 0), "warmup_steps must be an integer of at least 0", steps)
        require(steps <= self.steps, f"warmup_steps must be at most steps, {self.steps}", steps)
        require(is_finite(share) and 0 <= share <= 1, "warmup_ratio must be a number from 0 to 1", share)
        require(not (steps and share), "warmup_steps and warmup_ratio both set the warm-up; leave out one", share)
        bounded = is_finite(least) and 0 <= least <= rate
        require(bounded, f"min_learning_rate must be from 0 to learning_rate, {rate:g}", least)
        require(not least or self.schedule != CONSTANT, "a constant schedule has no min_learning_rate", least)

    def steps_alone(self) -> TrainConfig:
        """Returns these settings for a run without an output folder and held-out batches."""
        return replace(self, save_steps=None, keep_best=0, eval_steps=None, patience=None, best_by=LOSS)

    @property
    def steps_of_warmup(self) -> int:
        """The steps in which the learning rate rises."""
        return self.warmup_steps or math.ceil(self.warmup_ratio * self.steps)


def steps_of_epochs(epochs: float, batches: int, gradient_accumulation: int = 1) -> int:
    """Returns the steps that take `epochs` passes over an epoch of `batches` batches, rounded up.

    Raises ConfigError for a number of epochs that is not above 0 or makes too many steps.
    """
    require(is_finite(epochs) and epochs > 0, "epochs must be a finite number above 0", epochs)
    steps = math.ceil(epochs * batches / gradient_accumulation)
    require(is_count(steps, 1), "epochs must make a number of steps that can be counted", epochs)
    return steps
