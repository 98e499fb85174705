"""The options of a training run that only `train` has: adapters, steps, learning rates, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_lite.cli.data_options import SOURCES_HELP
from qlora_lite.cli.options import CHOICE_OF_NAMES, InFile

Data = Annotated[list[str], typer.Option("--data", help=SOURCES_HELP), InFile(path=True)]
Regression = Annotated[
    bool,
    typer.Option("--regression/--no-regression", help="Labels are numbers to predict, not classes, also whole ones."),
]
FromAdapter = Annotated[
    Path | None,
    typer.Option(
        help="Adapter to go on from, of a run (out/run/adapter) or of peft: a new run with its layers, rank and values."
    ),
]
Variant = Annotated[
    str,
    typer.Option(help="lora, or a variant of it, such as dora."),
    InFile(words="qlora_lite.lora.variants:VARIANTS"),
]
InitLoraWeights = Annotated[
    str,
    typer.Option(help="Start of A and B: normal, kaiming, gaussian, orthogonal, pissa or loftq."),
    InFile(words="qlora_lite.lora.config:INITS"),
]
Dropout = Annotated[float, typer.Option(help="Dropout probability on the input of the adapters.")]
TargetModules = Annotated[
    str,
    typer.Option(
        help="Layers that get adapters: all-linear (of the language model), all-linear-with-towers (also of a "
        "vision tower), names or their last parts separated by commas, or re: and a regular expression for the "
        "whole name, as re:.*layers.[0-3].*q_proj."
    ),
    CHOICE_OF_NAMES,
]
ExcludeModules = Annotated[
    str | None,
    typer.Option(
        help="Layers of these that get no adapter: any parts of their names separated by commas, as vision_tower, "
        "or re: and a regular expression."
    ),
    CHOICE_OF_NAMES,
]
LayersToTransform = Annotated[
    str | None,
    typer.Option(help="Numbers of the blocks that get adapters, as 0-7,12. Default: all blocks."),
    InFile(others="numbers and ranges, in a list or with commas between them", names=True),
]
ModulesToSave = Annotated[
    str, typer.Option(help="Modules that are trained themselves, without adapters: norm,lm_head."), CHOICE_OF_NAMES
]
Bias = Annotated[
    str,
    typer.Option(help="Biases to train: none, lora_only (of adapted layers) or all."),
    InFile(words="qlora_lite.lora.config:BIASES"),
]
TrainableTokenIndices = Annotated[
    str,
    typer.Option(help="Token ids whose embeddings are trained: 50001,50002."),
    InFile(others="token ids, in a list or with commas between them", names=True),
]
BatchSize = Annotated[int, typer.Option(help="Rows of a batch.")]
EvalData = Annotated[
    list[str] | None,
    typer.Option(
        "--eval-data",
        help="Records that are not trained on: their loss is computed before, after, and every --eval-steps steps.",
    ),
    InFile(path=True),
]
EvalShare = Annotated[
    float | None,
    typer.Option(help="Share of the records of --data that is held out in this way. Equal records stay together."),
]
EvalSteps = Annotated[
    int | None,
    typer.Option(help="Steps between two evaluations of held-out records; the best adapter is kept in best_adapter/."),
]
Patience = Annotated[
    int | None, typer.Option(help="Stop when so many evaluations in a row were not better than the best one.")
]
BestBy = Annotated[
    str,
    typer.Option(
        help="Which evaluation is better, for the adapter and checkpoints that are kept and for --patience: of the "
        "lower held-out loss (loss), or of the higher exact match of --eval-generate (exact_match)."
    ),
    InFile(words="qlora_lite.training.config:BEST_BY"),
]
EvalGenerate = Annotated[
    int | None,
    typer.Option(help="Exact match, at each evaluation: answers written to so many held-out records with short ones."),
]
Packing = Annotated[bool, typer.Option(help="Put several examples into one row of up to --max-length tokens.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue from the newest intact checkpoint in the output folder, if any.")
]
Track = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        help="Tracker that is told the figures of the run: tensorboard, wandb, trackio or mlflow; repeatable.",
    ),
    InFile(words="qlora_lite.integrations.trackers:TRACKERS"),
]
CHECKPOINTING_HELP = (
    "Activation checkpointing: full recomputes all blocks in backward, none recomputes no block, and a size such as "
    "300MiB limits the bytes above those of the model. Default: full."
)
OptionalCheckpointing = Annotated[
    str | None,
    typer.Option("--checkpointing", help=CHECKPOINTING_HELP),
    InFile(words="qlora_lite.training.config:CHECKPOINTING", others="a size such as 300MiB"),
]
MemoryBudget = Annotated[
    str | None,
    typer.Option(help="Choose --checkpointing by prediction: the least that fits into this memory, as 20GiB."),
    InFile(others="a size such as 20GiB"),
]
Shard = Annotated[
    bool,
    typer.Option(
        "--shard/--no-shard",
        help="Hold the packed base in shares, one in each process that torchrun or accelerate launch started.",
    ),
]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps. Default: 100, or those of --epochs.")]
Epochs = Annotated[
    float | None, typer.Option(help="Passes over the records, in place of --steps; 0.5 is half of a pass.")
]
LearningRate = Annotated[float, typer.Option(help="Peak learning rate, reached after the warm-up.")]
Schedule = Annotated[
    str,
    typer.Option(help="Learning rate after the warm-up: cosine or linear (falling to the minimum), or constant."),
    InFile(words="qlora_lite.training.config:SCHEDULES"),
]
WarmupSteps = Annotated[int, typer.Option(help="Steps of linear warm-up of the learning rate.")]
WarmupRatio = Annotated[float, typer.Option(help="Warm-up as a share of the steps, as 0.03, in place of steps.")]
MinLearningRate = Annotated[float, typer.Option(help="Learning rate that cosine and linear fall to.")]
WeightDecay = Annotated[float, typer.Option(help="Weight decay of AdamW, for matrices.")]
GradientAccumulation = Annotated[int, typer.Option(help="Batches of a step.")]
MaxGradNorm = Annotated[
    str,
    typer.Option(help="Gradients are scaled down to this norm if theirs is larger; none does not clip."),
    InFile(words=("none",), number=float),
]
LoraPlusRatio = Annotated[float, typer.Option(help="LoRA+: learning rate of B divided by the learning rate of A.")]
NeftuneNoiseAlpha = Annotated[
    float | None, typer.Option(help="NEFTune: strength of noise on the embeddings in training, as 5. Default: none.")
]
Seed = Annotated[int, typer.Option(help="Seed of data order, adapters, dropout and noise.")]
SaveSteps = Annotated[
    int | None, typer.Option(help="Steps between two checkpoints. Default: one when a signal stops the run.")
]
KeepLast = Annotated[
    str, typer.Option(help="Number of newest checkpoints to keep, or all."), InFile(words=("all",), number=int)
]
KeepBest = Annotated[int, typer.Option(help="Number of older checkpoints to keep: the best ones.")]
