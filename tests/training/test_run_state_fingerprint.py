"""One bit, name or fact of a base is another sum; adapters are none of it."""

from __future__ import annotations

import copy

import torch
from torch import nn

from qlora_lite import LoraConfig, QuantConfig, add_lora_, quantize_base_
from qlora_lite.training.run_state import base_fingerprint


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64, bias=False))
    quantize_base_(layers, QuantConfig("int8"))
    add_lora_(layers, LoraConfig(rank=2, target_modules="all-linear"))
    return layers


def test_sums_tell_what_changed_and_do_not_see_adapters() -> None:
    base, one = base_fingerprint(model()), model()
    nn.init.normal_(one[0].lora_B)
    one[0].keep_start()
    assert base_fingerprint(one) == base and set(base) == {"layout", "values", "config"}
    bit, fact, column = copy.deepcopy(one), copy.deepcopy(one), copy.deepcopy(one)
    bit[2].base_layer.weight.packed[63, 63] ^= 1
    fact[0].base_layer.weight.int8_activations = True
    for changed, name in ((bit, "values"), (fact, "layout")):
        assert {key for key, value in base_fingerprint(changed).items() if value != base[key]} == {name}
    weight = column[1].weight.detach()
    column[1].weight = nn.Parameter(torch.stack((weight, weight), 1)[:, 0], requires_grad=False)  # not contiguous
    assert base_fingerprint(column) == base
