"""Tests of patches that hold within a block and restore the previous state."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_lite.patches import (
    SDPA,
    exchange_attention_,
    loss_output,
    patched_attention,
    patched_compile,
    patched_forward,
    patched_mask_creation,
    patched_module_apply,
    patched_storage_resize,
    patched_template_date,
)

TOKENS = torch.arange(16, 28).view(2, 6)


def test_a_forward_is_restored_whether_inherited_or_own() -> None:
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    before = layer(x)
    with pytest.raises(ValueError, match="inside"), patched_forward(layer, lambda x: x * 7):
        assert torch.equal(layer(x), x * 7)
        with patched_forward(layer, lambda x: x * 9):
            assert torch.equal(layer(x), x * 9)
        assert torch.equal(layer(x), x * 7)
        raise ValueError("inside")
    assert torch.equal(layer(x), before) and "forward" not in vars(layer)
    own: Any = layer
    own.forward = mine = lambda x: x * 3
    with patched_forward(layer, lambda x: x):
        assert torch.equal(layer(x), x)
    assert own.forward is mine


def test_a_deep_copy_within_the_block_is_as_before_it() -> None:
    model, x = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.ones(1, 2)
    own: Any = model[1]
    own.forward = mine = lambda x: x * 3
    with patched_forward(model[0], lambda x: x * 7), patched_forward(model[1], lambda x: x * 5):
        with patched_forward(model[0], lambda x: x * 2):
            copies = copy.deepcopy(model), copy.deepcopy(model[0])
            assert torch.equal(model(x), x * 10)
        assert torch.equal(model(x), x * 35)
        copies = (*copies, copy.deepcopy(nn.ModuleList([model, model]))[1])
    assert "__deepcopy__" not in vars(model[0]) and own.forward is mine
    for made in (copies[0][0], copies[1], copies[2][0]):
        assert not {"forward", "__deepcopy__"} & {*vars(made)} and made.weight is not model[0].weight
        assert torch.equal(made(x), model[0](x))
    assert vars(copies[0][1])["forward"] is mine and "__deepcopy__" not in vars(copies[0][1])


def test_attention_is_replaced_for_models_that_use_it_and_the_registry_is_left_as_it_was(small_model: Any) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, tokens = small_model("LlamaConfig"), torch.tensor([[1, 2, 3]])
    before, local = ALL_ATTENTION_FUNCTIONS[SDPA], dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    calls: list[int] = []

    def counted(own: Any) -> Any:
        return lambda *args, **kwargs: (calls.append(1), own(*args, **kwargs))[1]

    expected = model(tokens).logits
    with patched_attention(model, counted):
        assert torch.equal(model(tokens).logits, expected)
    assert len(calls) == model.config.num_hidden_layers
    assert ALL_ATTENTION_FUNCTIONS[SDPA] is before and ALL_ATTENTION_FUNCTIONS._local_mapping == local
    with patched_attention(nn.Linear(2, 2), counted):
        assert ALL_ATTENTION_FUNCTIONS[SDPA] is before


def test_a_fake_tensor_is_not_taken_for_tracing() -> None:
    import transformers.masking_utils as masks

    before = masks.is_tracing
    with FakeTensorMode() as mode, patched_mask_creation():
        assert not masks.is_tracing(mode.from_tensor(torch.ones(2)))
    assert masks.is_tracing is before


def test_modules_of_fake_tensors_change_their_dtype() -> None:
    before = nn.Module._apply
    with FakeTensorMode(), patched_module_apply():
        layer = nn.BatchNorm1d(3)
        weight = layer.weight
        assert layer.to(torch.bfloat16).weight is weight and weight.dtype == torch.bfloat16
        assert layer.running_mean is not None and layer.running_mean.dtype == torch.bfloat16
    assert nn.Module._apply is before


def test_resized_storages_are_reported() -> None:
    before = vars(torch.UntypedStorage).get("resize_")
    seen: list[int] = []
    tensor: Tensor = torch.ones(4)
    with patched_storage_resize(lambda storage: seen.append(storage.nbytes())):
        tensor.untyped_storage().resize_(32)
    tensor.untyped_storage().resize_(64)
    assert seen == [32] and vars(torch.UntypedStorage).get("resize_") is before


def test_templates_write_the_date_that_is_set() -> None:
    import transformers.utils.chat_template_utils as templates

    def written() -> str:
        template = "{{ strftime_now('%d %b %Y %H:%M') }}"
        return str(templates.render_jinja_template(conversations=[[]], chat_template=template)[0][0])

    before = templates.datetime
    with pytest.raises(ValueError, match="inside"), patched_template_date(datetime.date(2024, 2, 29)):
        assert written() == "29 Feb 2024 00:00"
        with patched_template_date(datetime.date(1999, 12, 31)):
            assert written() == "31 Dec 1999 00:00"
        assert written() == "29 Feb 2024 00:00"
        raise ValueError("inside")
    assert templates.datetime is before is datetime.datetime
    assert written().startswith(datetime.date.today().strftime("%d %b %Y"))


def test_only_the_model_that_is_told_so_uses_another_attention(small_model: Callable[..., Any]) -> None:
    calls: list[str] = []

    def make(own: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given, **options: (calls.append("here"), own(*given, **options))[1]

    one, other = small_model("LlamaConfig"), small_model("LlamaConfig")
    expected = one(TOKENS).logits
    assert exchange_attention_(one, "a_test_sdpa", make) == SDPA
    assert torch.equal(one(TOKENS).logits, expected) and len(calls) == 2
    assert torch.equal(other(TOKENS).logits, expected) and len(calls) == 2
    assert exchange_attention_(one, SDPA) == "a_test_sdpa"
    assert torch.equal(one(TOKENS).logits, expected) and len(calls) == 2


def test_models_with_another_attention_keep_it(small_model: Callable[..., Any]) -> None:
    model = small_model("LlamaConfig")
    model.set_attn_implementation("eager")
    assert exchange_attention_(model, "a_test_sdpa", lambda own: own) is None
    assert model.config._attn_implementation == "eager"
    assert exchange_attention_(torch.nn.Linear(2, 2), "a_test_sdpa", lambda own: own) is None


def test_an_output_with_a_loss_has_nothing_else() -> None:
    assert list(loss_output(torch.zeros(()))) == ["loss"]


def test_functions_are_compiled_when_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, dict[str, Any]]] = []

    def compile(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        compiled.append((function.__name__, options))
        return lambda *given: ("compiled", function(*given))

    monkeypatch.setattr(torch, "compile", compile)
    with patched_compile():

        @torch.compile
        def plain(x: int) -> int:
            return x + 1

        @torch.compile(dynamic=False)
        def with_options(x: int) -> int:
            return x + 2

    assert torch.compile is compile and not compiled and plain.__name__ == "plain"
    assert [plain(1), plain(2), with_options(1)] == [("compiled", 2), ("compiled", 3), ("compiled", 3)]
    assert compiled == [("plain", {}), ("with_options", {"dynamic": False})]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert plain(1) == 2
