"""Do trl's trainers learn on a packed base what they learn with real peft on the same weights unpacked?

    python tests/interop/trl_trainers.py                 # every case: about a minute (make interop)
    python tests/interop/trl_trainers.py --case kto

Each case is a trainer with its data. It takes two steps here, on a packed model in fp32, and as trl has it, with peft's
own layers on the unpacked weights. Losses and norms of gradients agree to 1e-4, one model is in memory here, and the
checkpoint has the adapter only. Prints the failed cases, and one JSON line: `cases`, `failed`.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import peft
import torch
import transformers
from datasets import Dataset

from peft_pairs import unpacked
from qlora_lite import load_quantized
from qlora_lite.checkpoints import load_tokenizer
from qlora_lite.integrations import trl as packed_trl

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from tiny_model import make_tiny_model

STEPS = 2
TOLERANCE = 1e-4
SMALL_FILES = 60_000  # bytes of the tokenizer, the random states, the settings and the model card
SETTINGS: dict[str, Any] = {"max_steps": STEPS, "save_steps": STEPS, "logging_steps": 1, "learning_rate": 1e-3}
SETTINGS |= {"per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True}
FIGURES = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "rewards/margins", "logits/chosen", "kl", "accuracy")
MODELS = ("LlamaForCausalLM", "LlamaForSequenceClassification")
# trl masks what is not the assistant's by these marks.
MARKED_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}</s>{% endgeneration %}{% else %}{{ message['content'] }}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)

PAIRS = [{"prompt": f"how many {i}?", "chosen": f" {i} of them", "rejected": " none"} for i in range(4)]
TEXTS = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
CHATS = [
    {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
    for row in TEXTS
]
JUDGED = [row | {"label": index % 2 == 0} for index, row in enumerate(TEXTS)]
PROMPTS = [{"prompt": pair["prompt"]} for pair in PAIRS]


def length_reward(completions: list[str], **given: object) -> list[float]:
    """A reward that differs within a group."""
    return [float(len(set(text))) for text in completions]


@dataclass(frozen=True)
class Case:
    """A trainer of trl, by the start of its name, with its rows. settings: of its configuration. given: to itself.

    module: where trl has it. task: of the model. template: of chats. peft_type: peft's name of the task.
    """

    trainer: str
    rows: Sequence[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    module: str = "trl"
    task: str | None = None
    template: str | None = None
    peft_type: str = "CAUSAL_LM"


SHORT: dict[str, Any] = {"max_length": 32}
SAMPLED: dict[str, Any] = {"max_completion_length": 6, "num_generations": 2}
CASES = {
    "sft": Case("SFT", TEXTS, SHORT),
    "sft_chats": Case("SFT", CHATS, {"max_length": 64}),
    "sft_packing": Case("SFT", [{"text": row["prompt"] * 2} for row in TEXTS * 2], SHORT | {"packing": True}),
    "sft_assistant_only": Case("SFT", CHATS, {"max_length": 64, "assistant_only_loss": True}, template=MARKED_TEMPLATE),
    "sft_kept": Case("SFT", TEXTS, SHORT | {"gradient_checkpointing": False}),
    "dpo": Case("DPO", PAIRS, SHORT),
    "orpo": Case("ORPO", PAIRS, SHORT, module="trl.experimental.orpo"),
    "cpo": Case("CPO", PAIRS, SHORT, module="trl.experimental.cpo"),
    "kto": Case("KTO", JUDGED, SHORT),
    "reward": Case("Reward", PAIRS, SHORT, task="sequence-classification", peft_type="SEQ_CLS"),
    "grpo": Case("GRPO", PROMPTS, SAMPLED, {"reward_funcs": length_reward}),
    "rloo": Case("RLOO", PROMPTS, SAMPLED, {"reward_funcs": length_reward}),
}


def _models() -> int:
    """Returns the number of models in memory."""
    gc.collect()
    return sum(type(thing).__name__ in MODELS for thing in gc.get_objects())


def trained(case: Case, folder: Path, out: Path, ours: bool) -> Any:
    """Returns the trainer of a case after its steps: one of ours, or trl's own on unpacked weights."""
    labels = {"labels": 1} if case.task else {}
    model: Any = load_quantized(folder, dtype=torch.float32, task=case.task, **labels)
    if not ours:
        model = unpacked(model)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = case.template or tokenizer.chat_template
    module: Any = importlib.import_module(case.module)
    kind = getattr(module, f"{case.trainer}Trainer")
    torch.manual_seed(0)
    run = (packed_trl.packed(kind) if ours else kind)(
        model=model,
        args=getattr(module, f"{case.trainer}Config")(output_dir=str(out), **SETTINGS, **case.settings),
        train_dataset=Dataset.from_list(list(case.rows)),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear", task_type=case.peft_type),
        **case.given,
    )
    run.train()
    return run


def figures(run: Any) -> list[dict[str, float]]:
    """Returns what a trainer logged in each step."""
    log = [entry for entry in run.state.log_history if "loss" in entry]
    return [{name: float(entry[name]) for name in FIGURES if name in entry} for entry in log]


def check(name: str, folder: Path, out: Path) -> None:
    """Runs a case on both sides. Raises AssertionError that says what differs."""
    case, before = CASES[name], _models()
    run = trained(case, folder, out / "ours", ours=True)
    assert _models() == before + 1, f"{_models() - before} models are in memory"
    mine, theirs = figures(run), figures(trained(case, folder, out / "trl", ours=False))
    assert len(mine) == len(theirs) == STEPS
    for step, (ours, peer) in enumerate(zip(mine, theirs, strict=True), start=1):
        assert ours.keys() == peer.keys() > {"loss"}, f"figures {sorted(ours)} and {sorted(peer)}"
        for figure, value in peer.items():
            close = math.isclose(ours[figure], value, rel_tol=TOLERANCE, abs_tol=1e-5)
            assert close, f"step {step}: {figure} is {ours[figure]:.7g} and of trl {value:.7g}"
    if name == "dpo":
        assert abs(mine[0]["loss"] - math.log(2)) < 1e-6
    sizes = {file.name: file.stat().st_size for file in (out / "ours" / f"checkpoint-{STEPS}").iterdir()}
    assert "model.safetensors" not in sizes
    assert sum(sizes.values()) <= 3 * sizes["adapter_model.safetensors"] + SMALL_FILES, f"checkpoint of {sizes}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--case", choices=CASES, help="this case alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # of trl and transformers about their own settings
    chosen = [given.case] if given.case else list(CASES)
    failed = []
    for name in chosen:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                check(name, make_tiny_model(Path(scratch) / "model"), Path(scratch))
            except Exception:
                failed.append(name)
                print(f"{name}:\n{traceback.format_exc(limit=-3)}")
    print(json.dumps({"cases": len(chosen), "failed": failed}))
    raise SystemExit(len(failed) > 0)


if __name__ == "__main__":
    main()
