"""Takes training steps of a Llama on fake tensors of a pretended accelerator, in a process of its own.

`python tests/pretended_accelerator.py CHECKPOINT` prints the devices of all tensors of the step for each kind of base,
and the error for an adapter that was left on the CPU. It needs its own process, in which a backend can be registered
only once.
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from qlora_lite import LoraConfig, QuantConfig, TrainConfig, add_lora_, load_quantized
from qlora_lite.lora.adapters import adapter_parameters, lora_layers
from qlora_lite.training.forward.activation_checkpointing import checkpointed
from qlora_lite.training.forward.fused_forward import fused
from qlora_lite.training.objective.losses import logit_free_loss, logits_loss
from qlora_lite.training.optim import make_optimizer

DEVICE = "fakegpu"
CASES = (("nf4", "int8", "full"), ("int8", "none", "none"), ("none", "none", "full"))


def pretend_(model: nn.Module) -> None:
    """Puts a fake tensor of the pretended device in the place of every parameter and buffer."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype, device=DEVICE)
            module._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=DEVICE)


def step(model: nn.Module, checkpointing: str) -> set[str]:
    """Two whole steps, one with each loss; the devices of gradients, loss and optimizer states."""
    adapters = adapter_parameters(model)
    optimizer = make_optimizer(adapters, TrainConfig())
    ids = torch.zeros(2, 12, dtype=torch.int64, device=DEVICE)
    devices = set()
    for loss_of in (logit_free_loss, logits_loss):
        with fused(model) as exchanged, checkpointed(model, checkpointing):
            assert len(exchanged) == 9  # norms, gated products and attention of two blocks, and the last norm
            loss = loss_of(model, {"input_ids": ids, "labels": ids, "attention_mask": ids})
            loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters.values(), 1.0, foreach=False)
        optimizer.step()
        devices |= {loss.device.type} | {parameter.grad.device.type for parameter in adapters.values()}
    return devices | {v.device.type for state in optimizer.state.values() for v in state.values() if v.dim()}


def error_of_a_stray_adapter(model: nn.Module) -> str:
    layer = next(iter(lora_layers(model).values()))
    layer.lora_A = nn.Parameter(torch.empty(layer.lora_A.shape))
    ids = torch.zeros(2, 12, dtype=torch.int64, device=DEVICE)
    try:
        logit_free_loss(model, {"input_ids": ids, "labels": ids})
    except RuntimeError as error:
        return type(error).__name__
    return "none"


def convolution_step() -> set[str]:
    """A step of an adapted convolution: the devices of output, gradients and optimizer states."""
    model = nn.Sequential(nn.Conv2d(4, 6, 3, 2, "valid", 1, 2, padding_mode="circular"))
    add_lora_(model, LoraConfig(rank=2, dropout=0.1, target_modules=["0"], variant="dora"))
    with FakeTensorMode():
        pretend_(model)
        adapters = adapter_parameters(model)
        y = model(torch.zeros(2, 4, 8, 8, device=DEVICE))
        y.square().mean().backward()
        optimizer = make_optimizer(adapters, TrainConfig())
        optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
        return {tensor.device.type for tensor in (y, *(parameter.grad for parameter in adapters.values()), *states)}


def main(folder: str) -> None:
    _setup_privateuseone_for_python_backend(DEVICE)
    torch.fakegpu.get_amp_supported_dtype = lambda: [torch.bfloat16]  # transformers' rotary embedding asks for it
    for format, embedding_format, checkpointing in CASES:
        model = load_quantized(folder, QuantConfig(format=format, embedding_format=embedding_format)).train()
        add_lora_(model, LoraConfig(rank=4, dropout=0.1))
        with FakeTensorMode():
            pretend_(model)
            print(format, *step(model, checkpointing), error_of_a_stray_adapter(model))
    print("convolution", *convolution_step())


if __name__ == "__main__":
    main(sys.argv[1])
