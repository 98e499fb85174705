"""What is done with adapters beyond their settings, for peft_matrix.py: each function is a case on a base."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable

import peft
import torch

from peft_other_models import conv1d, custom_model, stacks_of_experts
from peft_pairs import (
    TOKENS,
    check_differ,
    check_equal,
    check_gradients,
    check_refused,
    check_same,
    config,
    fill_,
    gradients,
    logits,
    packed_model,
    pair,
    unpacked,
)
from qlora_lite.integrations import get_peft_model, load_peft_model


def several_active(format: str) -> None:
    """Several adapters at once, on the same layers and on others."""
    found = pair(format)
    found.add_("second", seed=1, r=2, use_rslora=True)
    found.add_("third", seed=2, target_modules=["o_proj", "down_proj"])
    one = check_same(found)
    for model in found.both:
        model.base_model.set_adapter(["default", "second", "third"])
    check_differ(check_same(found), one, "the second adapter")
    check_gradients(found)


def set_adapter(format: str) -> None:
    """The chosen adapter computes and is trained, and no other."""
    found = pair(format)
    found.add_("second", seed=1, use_dora=True)
    one = check_same(found)
    for model in found.both:
        model.set_adapter("second")
    check_differ(check_same(found), one, "the second adapter")
    check_gradients(found)
    for model in found.both:
        model.set_adapter("default")
    assert torch.equal(check_same(found), one)


def add_and_delete(format: str) -> None:
    """A deleted adapter is gone, and its name can be used again."""
    found = pair(format)
    one = check_same(found)
    found.add_("second", target_modules=["o_proj"])
    for model in found.both:
        model.delete_adapter("second")
    assert torch.equal(check_same(found), one)
    assert not [name for name, _ in found.ours.named_parameters() if "second" in name]
    found.add_("second", seed=3, r=7)
    for model in found.both:
        model.set_adapter("second")
    check_differ(check_same(found), one, "the new adapter")
    for model in found.both:
        model.delete_adapter("default")
    check_same(found)


def later_all_linear(format: str) -> None:
    """A second adapter for `all-linear` gets every linear layer, although only two were adapted before."""
    found = pair(format)
    found.add_("second", target_modules="all-linear")
    for model in found.both:
        model.set_adapter("second")
    check_same(found)
    check_gradients(found)


def weighted(format: str) -> None:
    """`add_weighted_adapter` gives peft's sums, for each way to add."""
    found = pair(format)
    found.add_("second", seed=1)
    ways = ("linear", "svd", "cat", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd")
    for way in (*ways, "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"):
        for model in found.both:
            torch.manual_seed(0)
            model.add_weighted_adapter(["default", "second"], [0.7, -0.4], way, combination_type=way, density=0.5)
            model.set_adapter(way)
        check_equal(logits(found.ours), logits(found.theirs), f"logits of {way}", 1e-4 if "svd" in way else 1e-5)
    with found.ours.disable_adapter():
        base = logits(found.ours)
    check_differ(logits(found.ours), base, "the sum")


def weighted_is_refused(format: str) -> None:
    """What a sum of A and B would be wrong for is refused by name."""
    for settings in ({"use_dora": True}, {"use_rslora": True}, {"lora_bias": True, "target_modules": ["q_proj"]}):
        model = pair(format, **settings).ours
        arguments = {"adapters": ["default"], "weights": [0.5], "adapter_name": "sum", "combination_type": "linear"}
        check_refused(model.add_weighted_adapter, next(iter(settings)), **arguments)
        assert "sum" not in model.peft_config


def mixed_batch(format: str) -> None:
    """Rows of one batch with different adapters, and without one; in linear layers and embeddings."""
    for settings in ({}, {"embedding": "int8", "target_modules": ["embed_tokens", "lm_head", "v_proj"]}):
        found = pair(format, **settings)
        targets = settings.get("target_modules", ["o_proj"])
        found.add_("second", target_modules=targets)
        rows = [logits(found.ours)[0]]
        found.ours.set_adapter("second")
        rows.append(logits(found.ours)[1])
        for names in (["default", "second"], ["__base__", "default"]):
            ours, theirs = (logits(model, adapter_names=names) for model in found.both)
            check_equal(ours, theirs)
            if names[0] == "default":
                check_equal(ours, torch.stack(rows))


def merge_some(format: str) -> None:
    """Named adapters are merged, a DoRA and a plain one at once, and `unload` keeps what is merged, as in peft."""
    found = pair(format, use_dora=True)
    found.add_("second", seed=4)
    for model in found.both:
        model.base_model.set_adapter(["default", "second"])
    separate = check_same(found)
    found.ours.merge_adapter()
    check_equal(logits(found.ours), separate, "merged logits")
    found.ours.unmerge_adapter()
    assert torch.equal(logits(found.ours), separate)
    for model in found.both:
        model.base_model.set_adapter("default")
        model.merge_adapter(adapter_names=["second"])
    merged = check_same(found)
    check_differ(merged, separate, "merging one of two adapters")
    check_equal(logits(found.ours.unload()), logits(found.theirs.unload()), "logits after unload")


def merge_two_dora(format: str) -> None:
    """Two DoRA adapters are merged to what they compute at once."""
    ours = pair(format, use_dora=True).ours
    ours.add_adapter("second", config(use_dora=True))
    ours.set_adapter("second")
    fill_(ours, seed=6)
    ours.base_model.set_adapter(["default", "second"])
    separate = logits(ours)
    check_equal(logits(ours.merge_and_unload()), separate)


def merge_of_a_bias(format: str) -> None:
    """A merge that a layer without a bias cannot hold is refused, and changes nothing."""
    found = pair(format, lora_bias=True, target_modules=["q_proj", "down_proj"])
    before = check_same(found)
    for merge in (found.ours.merge_adapter, found.ours.merge_and_unload):
        check_refused(merge, "down_proj", "lora_bias")
        assert torch.equal(logits(found.ours), before)


def low_cpu_mem_usage(format: str) -> None:
    """Adapters on meta get the values of a file."""
    for settings in ({}, {"use_dora": True}, {"embedding": "int8", "target_modules": ["embed_tokens"]}):
        found = pair(format, **settings)
        made = get_peft_model(
            packed_model(format, **settings), found.ours.peft_config["default"], low_cpu_mem_usage=True
        )
        assert {p.device.type for name, p in made.named_parameters() if "lora_" in name} == {"meta"}
        with tempfile.TemporaryDirectory() as folder:
            found.ours.save_pretrained(folder, save_embedding_layers=False)
            again = load_peft_model(packed_model(format, **settings), folder, low_cpu_mem_usage=True)
        assert torch.equal(logits(again), logits(found.ours))


def loaded_for_training(format: str) -> None:
    """A loaded adapter is frozen unless `is_trainable`."""
    found = pair(format, modules_to_save=["norm"])
    with tempfile.TemporaryDirectory() as folder:
        found.ours.save_pretrained(folder)
        frozen = load_peft_model(packed_model(format), folder, "mine")
        assert not any(value.requires_grad for value in frozen.parameters()) and frozen.active_adapter == "mine"
        trained = load_peft_model(packed_model(format), folder, is_trainable=True)
    assert gradients(trained).keys() == gradients(found.ours).keys()


def copies(format: str) -> None:
    """A deep copy computes the same and is independent; it adds adapters as the first does."""
    found = pair(format)
    before = check_same(found)
    other = copy.deepcopy(found.ours)
    assert torch.equal(logits(other), before)
    fill_(other, seed=8)
    other.add_adapter("second", config(target_modules="all-linear"))
    check_differ(logits(other), before, "new values")
    assert torch.equal(logits(found.ours), before) and "second" not in found.ours.peft_config


def checkpointing(format: str) -> None:
    """Gradients are the same with transformers' gradient checkpointing, in both of its forms."""
    for reentrant in (True, False):
        found = pair(format, use_dora=True)
        expected = gradients(found.ours)
        found.ours.zero_grad()
        found.ours.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        found.ours.enable_input_require_grads()
        found.ours.train()
        found.ours(input_ids=TOKENS, labels=TOKENS).loss.backward()
        for name, value in found.ours.named_parameters():
            if name in expected:
                check_equal(value.grad, expected[name], f"gradients of {name}")


def dropout(format: str) -> None:
    """In training, dropout sets a share of the inputs of A to 0 and scales the others, anew in each call."""
    model = pair(format, lora_dropout=0.25, target_modules=["q_proj"], r=32, lora_alpha=32, lora_bias=False).ours
    layer = next(part for name, part in model.named_modules() if name.endswith("layers.0.self_attn.q_proj"))
    layer.lora_A["default"].weight.data = torch.eye(32)
    layer.lora_B["default"].weight.data = torch.eye(32)
    x = torch.ones(400, 32)
    with torch.no_grad():
        plain = layer.get_base_layer()(x)
        check_equal(layer.eval()(x), plain + 1)
        masks = [(layer.train()(x) - plain) * 0.75 for _ in range(16)]
    for mask in masks:
        check_equal(mask, mask.round(), "the mask")
        assert set(mask.round().abs().unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(masks[0].round(), masks[1].round())
    assert abs(float(torch.stack(masks).mean()) - 0.75) < 0.02


def dtypes(format: str) -> None:
    """Adapters of a model in bf16 have the dtypes that peft gives them."""
    for cast in (True, False):
        base = packed_model(format).to(torch.bfloat16)
        ours = get_peft_model(copy.deepcopy(base), config(target_modules="all-linear"), autocast_adapter_dtype=cast)
        theirs = peft.get_peft_model(
            unpacked(base).to(torch.bfloat16), config(target_modules="all-linear"), autocast_adapter_dtype=cast
        )
        kinds = [
            {name: value.dtype for name, value in model.named_parameters() if "lora_" in name}
            for model in (ours, theirs)
        ]
        assert kinds[0] == kinds[1] and set(kinds[0].values()) == {torch.float32 if cast else torch.bfloat16}
        assert logits(ours).dtype == torch.bfloat16


def scaled(format: str) -> None:
    """`rescale_adapter_scale` scales the adapter within its block."""
    found = pair(format)
    before = check_same(found)
    with peft.helpers.rescale_adapter_scale(found.ours, 0.5), peft.helpers.rescale_adapter_scale(found.theirs, 0.5):
        check_differ(check_same(found), before, "the factor")
    assert torch.equal(check_same(found), before)


def generated(format: str) -> None:
    """`generate` gives peft's tokens, also with an adapter for each row; the status is peft's."""
    found = pair(format)
    found.add_("second", seed=1)
    for names in (None, ["second", "default"]):
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "adapter_names": names}
        ours, theirs = (model.eval().generate(input_ids=TOKENS, **options) for model in found.both)
        assert torch.equal(ours, theirs)
    status = [model.get_model_status() for model in found.both]
    assert status[0].available_adapters == status[1].available_adapters == ["default", "second"]
    assert status[0].trainable_params == status[1].trainable_params


ACTIONS: dict[str, Callable[[str], None]] = {
    action.__name__: action
    for action in (
        *(
            several_active,
            stacks_of_experts,
            set_adapter,
            add_and_delete,
            later_all_linear,
            weighted,
            weighted_is_refused,
            mixed_batch,
        ),
        *(merge_some, merge_two_dora, merge_of_a_bias, low_cpu_mem_usage, loaded_for_training, copies, checkpointing),
        *(dropout, dtypes, scaled, generated, conv1d, custom_model),
    )
}
