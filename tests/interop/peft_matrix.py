"""Does peft's API on a packed base do what peft does on the same weights unpacked?

    python tests/interop/peft_matrix.py                        # every case on every base: about a minute (make interop)
    python tests/interop/peft_matrix.py --base fp4 --case dora

A case is a setting of `peft.LoraConfig` with one check, or an action such as adding adapters. Its two models have equal
values in fp32, and outputs, gradients and merged weights agree to 1e-5. Prints the failed cases, and one JSON line:
`cases`, `failed`.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import nn

from peft_actions import ACTIONS
from peft_pairs import (
    BASES,
    check_differ,
    check_equal,
    check_gradients,
    check_same,
    logits,
    packed_model,
    pair,
    unpacked,
)
from qlora_lite import load_adapter_, save_adapter
from qlora_lite.integrations import load_peft_model
from qlora_lite.integrations.peft_embedding import PackedEmbedding
from qlora_lite.integrations.peft_experts import ParamWrapper
from qlora_lite.integrations.peft_linear import PackedLinear
from qlora_lite.quantization.layers import QuantizedEmbedding, QuantizedLinear

PACKED_LAYERS = (PackedLinear, PackedEmbedding, ParamWrapper)
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
PACKED = {"embedding": "int8"}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all_linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*layers\.1\.(self_attn|mlp)\.(v_proj|up_proj)"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.3},
    "dora_dropout": {"use_dora": True, "lora_dropout": 0.3},
    "random": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "patterns": {"rank_pattern": {"down_proj": 5}, "alpha_pattern": {"layers.1.self_attn.q_proj": 9}},
    "layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "exclude": {"exclude_modules": r".*layers\.0\..*"},
    "modules_to_save": {"modules_to_save": ["norm", "lm_head"]},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "tokens": {"trainable_token_indices": [3, 7, 9]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "packed_head": {"target_modules": ["q_proj", "lm_head"], **PACKED},
    "packed_embedding": {"target_modules": ["embed_tokens", "v_proj"], **PACKED},
    "both_tied": {"target_modules": ["embed_tokens", "lm_head"], **PACKED},
    "stacks": {
        "family": "mixtral",
        "target_parameters": STACKS,
        "target_modules": ["o_proj"],
        "alpha_pattern": {"down_proj": 2},
    },
    "stacks_in_out": {"family": "gpt_oss", "target_parameters": STACKS, "target_modules": ["q_proj"]},
    "one_stack": {"family": "mixtral", "target_parameters": STACKS[1:], "target_modules": [], "use_rslora": True},
    "v4_experts": {"family": "mixtral", "target_modules": ["q_proj", "w1", "w2", "w3"]},
}


def check_output(format: str, **settings: Any) -> None:
    """Outputs and gradients are those of peft."""
    found = pair(format, **settings)
    ours = check_same(found)
    check_gradients(found)
    with found.ours.disable_adapter(), found.theirs.disable_adapter():
        check_differ(ours, check_same(found), "the adapter")
    assert torch.equal(logits(found.ours), ours), "disable_adapter was not undone"


def packed_codes(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns copies of the codes and statistics of packed layers that have no adapter, under all their names."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    codes = [name for name in buffers if name.endswith((".packed", ".absmax"))]
    return {name.replace(".base_layer", ""): buffers[name].clone() for name in codes}


def check_merge(format: str, **settings: Any) -> None:
    """Merging is that of peft, is undone bit for bit, and gives plain layers when it is final."""
    found = pair(format, **settings)
    before = check_same(found)
    codes = packed_codes(found.ours.get_base_model())
    found.ours.merge_adapter()
    found.theirs.merge_adapter()
    merged = check_same(found)
    check_equal(merged, before, "merged logits")
    found.ours.unmerge_adapter()
    found.theirs.unmerge_adapter()
    adapted = {
        name: part
        for name, part in found.ours.get_base_model().named_modules()
        if isinstance(part, peft.tuners.lora.LoraLayer)
    }
    check_equal(logits(found.ours), before, "logits after unmerge_adapter")
    if all(isinstance(part, PACKED_LAYERS) for part in adapted.values()):  # peft subtracts from its own layers again
        assert torch.equal(logits(found.ours), before), "unmerge_adapter left other values"
    ours, theirs = found.ours.merge_and_unload(), found.theirs.merge_and_unload()
    check_equal(logits(ours), logits(theirs), "logits of the merged model")
    check_equal(logits(ours), before, "logits after merge_and_unload")
    for name in adapted:
        if isinstance(adapted[name], ParamWrapper):
            ours.get_submodule(name.replace(".base_layer", "")).get_parameter(adapted[name].parameter_name)
            continue
        assert type(ours.get_submodule(name)) in (nn.Linear, nn.Embedding), f"{name} was not unpacked"
        weights = [model.get_submodule(name).weight for model in (ours, theirs)]
        check_equal(*weights, f"merged weights of {name}")
    for name, value in packed_codes(ours).items():
        assert torch.equal(value, codes[name]), f"{name} changed"


def check_unload(format: str, **settings: Any) -> None:
    """`unload` gives the base as it was, which can be adapted again."""
    base = logits(packed_model(format, **settings))
    found = pair(format, **settings)
    whole = found.ours.unload()
    assert not any("lora" in name for name, _ in whole.named_modules())
    if not {"bias", "modules_to_save", "trainable_token_indices"} & settings.keys():
        assert torch.equal(logits(whole), base), "unload left other values"
    kinds = [type(module) for module in whole.modules()]
    assert QuantizedLinear in kinds and ("embedding" not in settings or QuantizedEmbedding in kinds)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def check_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: str) -> None:
    assert found.keys() == expected.keys(), f"{what}: other names: {sorted(found.keys() ^ expected.keys())[:4]}"
    assert all(torch.equal(found[name], value) for name, value in expected.items()), f"{what}: other values"


def check_files(format: str, **settings: Any) -> None:
    """Files are those of peft, and are read by all sides: values bit for bit."""
    found = pair(format, **settings)
    expected = check_same(found)
    options = {"save_embedding_layers": False}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found.ours.save_pretrained(folder / "ours", **options)
        found.theirs.save_pretrained(folder / "theirs", **options)
        written = tensors_in(folder / "theirs")
        check_bits(tensors_in(folder / "ours"), written, "the file of save_pretrained")
        again = load_peft_model(packed_model(format, **settings), folder / "theirs")
        assert torch.equal(logits(again), expected), "load_peft_model gives other logits"
        check_bits(peft.get_peft_model_state_dict(again, save_embedding_layers=False), written, "load_peft_model")
        plain = peft.PeftModel.from_pretrained(unpacked(packed_model(format, **settings)), str(folder / "ours"))
        check_equal(logits(plain), expected, "logits of real peft")
        if settings.get("bias", "none") != "none":  # peft has one adapter with a bias at most
            return
        again.load_adapter(folder / "ours", "second")
        again.set_adapter("second")
        assert torch.equal(logits(again), expected), "load_adapter gives other logits"


def check_sides(format: str, **settings: Any) -> None:
    """An adapter goes from peft to here, to `add_lora_` and back, in every order, and stays the same bit for bit."""
    found = pair(format, **settings)
    base, options = packed_model(format, **settings), {"save_embedding_layers": False}
    expected = check_same(found)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def through_here(before: str, after: str) -> None:
            model = load_peft_model(copy.deepcopy(base), folder / before)
            check_equal(logits(model), expected, f"logits of {after}")
            model.save_pretrained(folder / after, **options)

        def through_add_lora(before: str, after: str) -> None:
            model = copy.deepcopy(base)
            load_adapter_(model, folder / before)
            check_equal(logits(model), expected, f"logits of {after}")
            save_adapter(model, folder / after)

        def through_peft(before: str, after: str) -> None:
            model = peft.PeftModel.from_pretrained(unpacked(base), str(folder / before))
            check_equal(logits(model), expected, f"logits of {after}")
            model.save_pretrained(folder / after, **options)

        found.theirs.save_pretrained(folder / "peft", **options)
        through_here("peft", "peft-here")
        through_add_lora("peft", "peft-add_lora")
        through_add_lora("peft-here", "here-add_lora")
        through_here("peft-add_lora", "add_lora-here")
        through_peft("peft-add_lora", "add_lora-peft")
        through_peft("peft-here", "here-peft")
        written = tensors_in(folder / "peft")
        for step in sorted(folder.iterdir()):
            check_bits(tensors_in(step), written, step.name)


def check_state_dict(format: str, **settings: Any) -> None:
    """State dicts go from one side to the other."""
    found = pair(format, **settings)
    before = check_same(found)
    options = {"save_embedding_layers": False}
    state = peft.get_peft_model_state_dict(found.ours, **options)
    check_bits(state, peft.get_peft_model_state_dict(found.theirs, **options), "get_peft_model_state_dict")
    state = {name: value.clone() for name, value in state.items()}
    found.fill_(seed=5)
    check_differ(check_same(found), before, "other values")
    for model in found.both:
        result = peft.set_peft_model_state_dict(model, state)
        assert not result.unexpected_keys
    assert torch.equal(check_same(found), before)


CHECKS: dict[str, Callable[..., None]] = {
    "output": check_output,
    "merge": check_merge,
    "unload": check_unload,
    "files": check_files,
    "state_dict": check_state_dict,
    "sides": check_sides,
}


@dataclass(frozen=True)
class Case:
    """A setting with a check, or an action, on a base."""

    base: str
    name: str
    check: str

    def run(self) -> None:
        """Raises AssertionError if the case fails."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.name in ACTIONS:
                ACTIONS[self.name](self.base)
            else:
                CHECKS[self.check](self.base, **SETTINGS[self.name])


def cases() -> Iterator[Case]:
    """Yields every case on every base."""
    for base in BASES:
        yield from (Case(base, name, check) for name in SETTINGS for check in CHECKS)
        yield from (Case(base, name, "action") for name in ACTIONS)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", nargs="+", choices=BASES, default=BASES)
    parser.add_argument("--case", nargs="+", choices=(*SETTINGS, *ACTIONS))
    parser.add_argument("--traceback", action="store_true", help="show where a case failed")
    return parser.parse_args()


def passed(case: Case, with_traceback: bool) -> bool:
    """Runs a case. Prints why it failed, whatever it raised."""
    try:
        case.run()
    except Exception as error:
        print(f"{case.base} {case.name} {case.check}: {type(error).__name__}: {str(error)[:200]}")
        if with_traceback:
            traceback.print_exc()
        return False
    return True


def main() -> None:
    given = arguments()
    torch.set_num_threads(1)
    chosen = [case for case in cases() if case.base in given.base and (not given.case or case.name in given.case)]
    failed = sum([not passed(case, given.traceback) for case in chosen])
    print(json.dumps({"cases": len(chosen), "failed": failed}))
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
