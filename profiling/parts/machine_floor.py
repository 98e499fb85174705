"""The least cost of a training step on this machine: its matrix products and attention calls, and nothing else.

The step recomputes every block: two forward passes, backward with respect to the inputs of frozen weights, the low-rank
products of the adapters with all their gradients, attention, and the head with its gradient. The weights are dense and
in bf16.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_shapes(config: dict[str, Any]) -> list[tuple[int, int]]:
    """Returns (out, in) of the linear layers of one Llama block."""
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    attention = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
    return [*attention, (middle, hidden), (middle, hidden), (hidden, middle)]


class Floor:
    """The products of a step with a checkpoint's shapes: `rows` sequences of `tokens` tokens, adapters of `rank`."""

    def __init__(self, model: str, rows: int, tokens: int, rank: int) -> None:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        self.count = rows * tokens

        def random(*shape: int) -> Tensor:
            return torch.randn(shape).bfloat16()

        shapes = linear_shapes(config)
        self.layers = [
            [(random(*shape), random(rank, shape[1]), random(shape[0], rank)) for shape in shapes]
            for _ in range(config["num_hidden_layers"])
        ]
        self.inputs = {width: random(self.count, width) for shape in shapes for width in shape}
        self.head = random(config["vocab_size"], config["hidden_size"])
        heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
        size = config.get("head_dim") or config["hidden_size"] // heads
        self.query = random(rows, heads, tokens, size).requires_grad_()
        self.key, self.value = (random(rows, keys, tokens, size).requires_grad_() for _ in range(2))

    def _attention(self) -> Tensor:
        return F.scaled_dot_product_attention(self.query, self.key, self.value, is_causal=True, enable_gqa=True)

    def step(self) -> None:
        """Runs all products once."""
        for layer in self.layers:
            for weight, lora_A, lora_B in layer:
                x, grad = self.inputs[weight.shape[1]], self.inputs[weight.shape[0]]
                for _ in range(2):
                    y = x @ weight.T
                    low = x @ lora_A.T
                    y.addmm_(low, lora_B.T)
                grad_x = grad @ weight
                grad_low = grad @ lora_B
                grad_x.addmm_(grad_low, lora_A)
                grad_low.T @ x
                grad.T @ low
            with torch.no_grad():
                self._attention()
            attended = self._attention()
            torch.autograd.grad(attended, (self.query, self.key, self.value), attended.detach())
        rows = max(1, (32 << 20) // (4 * self.head.shape[0]))
        hidden = self.inputs[self.head.shape[1]]
        for start in range(0, self.count, rows):
            (hidden[start : start + rows] @ self.head.T) @ self.head


def cpu_name() -> str:
    """Returns the processor's name, and how many cores the workers use."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"{name}, {min(2, len(os.sched_getaffinity(0)))} cores"
