"""Predicted memory: a step run on fake tensors, an accelerator's allocator, and what fits.

In reading order:

rehearsal            rehearse: a step on fake tensors
kernel_workspaces    what an accelerator's kernels allocate inside themselves
cuda_segments        how CUDA's caching allocator gets and splits memory
cuda_allocator       what that allocator reserves for a trace
empty_checkpoint     a checkpoint of which only the shapes are known
training_rehearsal   rehearse_steps: the memory of training, from a config
layer_growth         the peaks of many layers from those of a few
forecast             peaks of many batches and settings
memory_plan          plan: what fits into a memory
memory_budget        config_within: the activation checkpointing that fits into a memory
plan_report          a plan as text
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.planning.forecast import Forecasts as Forecasts
    from qlora_lite.planning.forecast import Wanted as Wanted
    from qlora_lite.planning.memory_budget import BudgetedConfig as BudgetedConfig
    from qlora_lite.planning.memory_budget import config_within as config_within
    from qlora_lite.planning.memory_budget import device_memory as device_memory
    from qlora_lite.planning.memory_plan import Memory as Memory
    from qlora_lite.planning.memory_plan import Plan as Plan
    from qlora_lite.planning.memory_plan import plan as plan
    from qlora_lite.planning.plan_report import render_plan as render_plan
    from qlora_lite.planning.rehearsal import rehearse as rehearse
    from qlora_lite.planning.training_rehearsal import rehearse_steps as rehearse_steps

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "rehearsal": "rehearse",
        "training_rehearsal": "rehearse_steps",
        "forecast": "Wanted Forecasts",
        "memory_plan": "plan Plan Memory",
        "memory_budget": "config_within device_memory BudgetedConfig",
        "plan_report": "render_plan",
    },
)
