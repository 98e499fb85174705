"""Predicted memory: rehearse a step on fake tensors, forecast other batches from it, plan what fits.

In reading order:

rehearsal               rehearse: a step on fake tensors
cuda_workspaces         memory that CUDA libraries allocate without a tensor
cuda_block_pools        segments and blocks of CUDA's caching allocator
cuda_allocator          what that allocator reserves for a trace
shape_only_checkpoint   a checkpoint whose tensors have shapes and no values
training_rehearsal      rehearse_steps: the memory of training, from a config
layer_extrapolation     the peaks of a deep model from those of two shallow ones
forecast                Forecaster: predicted peaks of many batches and settings
memory_plan             plan: what fits into a given memory
memory_budget           config_within: the activation checkpointing that fits into a memory
batch_choice            choose_batch: the batch that a proposed run begins with
plan_report             a plan as text
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.planning.forecast import Forecaster as Forecaster
    from qlora_lite.planning.forecast import TrainingSetup as TrainingSetup
    from qlora_lite.planning.memory_budget import BudgetedConfig as BudgetedConfig
    from qlora_lite.planning.memory_budget import config_within as config_within
    from qlora_lite.planning.memory_budget import device_memory as device_memory
    from qlora_lite.planning.memory_plan import DeviceMemory as DeviceMemory
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
        "forecast": "TrainingSetup Forecaster",
        "memory_plan": "plan Plan DeviceMemory",
        "memory_budget": "config_within device_memory BudgetedConfig",
        "plan_report": "render_plan",
    },
)
