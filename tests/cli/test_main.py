"""The command line, with good and with bad input, as processes."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lite.cli.main import main
from qlora_lite.training.run_folder import RunFolder

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_help_needs_nothing_heavy(run: Run) -> None:
    heavy = "[name for name in ('torch', 'transformers', 'rich.table') if name in sys.modules]"
    program = f"import sys, qlora_lite.cli.main; print({heavy})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    for command in ((), ("train",), ("merge",), ("quantize",), ("profile",), ("plan",), ("env",)):
        assert run(*command, "--help").returncode == 0


def test_train_and_merge(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from qlora_lite import QuantConfig, load_adapter_, load_quantized

    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"number {n}"}) for n in range(8)))
    words = ("train", "--model", tiny_folder, "--data", data, "--output", tmp_path / "run", "--steps", 6)
    where = ("--layers-to-transform", "0-1", "--exclude-modules", "k_proj, layers.1.mlp.up_proj")
    beside = ("--modules-to-save", "model.norm", "--trainable-token-indices", "5,6")
    done = run(*words, *where, *beside, "--rank", 2, "--use_rslora", "--learning-rate", 0.01, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["last_loss"] < figures["first_loss"] and figures["examples"] == 8
    again = run(*words)
    assert again.returncode == 1 and "not empty" in again.stderr and len(again.stderr.splitlines()) == 1

    adapter = tmp_path / "run" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["use_rslora"] is True and config["modules_to_save"] == ["model.norm"]
    assert config["trainable_token_indices"] == {"model.embed_tokens": [5, 6]}
    words = ("merge", "--model", tiny_folder, "--adapter", adapter, "--output", tmp_path / "merged")
    done = run(*words, "--dtype", "fp32", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    # Eleven layers, a norm and the embedding.
    assert figures["layers_merged"] == 13 and figures["embedding_and_head_untied"] is False
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "number 9"}\n{"prompt": "number"}\n')
    done = run(*words, "--verify", prompts, "--overwrite", "--json")
    assert done.returncode == 0, done.stderr
    said, found = done.stdout.splitlines(), json.loads(done.stdout.splitlines()[-1])["verify"]
    assert found["sentence"] in said and "2 prompts" in done.stdout and found["adapter_loss"] < found["base_loss"]
    assert found == json.loads((tmp_path / "merged" / "merge_report.json").read_text())["verify"]
    ours = load_quantized(tiny_folder, QuantConfig())
    load_adapter_(ours, adapter)
    tokens = torch.arange(8).unsqueeze(0)
    torch.testing.assert_close(merged(tokens).logits, ours.float().eval()(tokens).logits, rtol=1e-4, atol=1e-5)


def test_a_stopped_run_says_the_command_that_goes_on_with_it(
    tiny_folder: Path, memory_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = memory_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"number {n}"}) for n in range(5)))
    words = ["train", "--model", tiny_folder, "--data", data, "--steps", 4, "--rank", 2, "--dropout", 0.1, "--output"]

    def command(*given: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["qlora-lite", *map(str, given)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().err

    real = RunFolder.note

    def note(run: RunFolder, step: Any, facts: Any = None) -> None:
        real(run, step, facts)
        if step.step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(RunFolder, "note", note)
    status, said = command(*words, memory_path / "run", "--overwrite")
    monkeypatch.setattr(RunFolder, "note", real)
    last = said.splitlines()[-1]
    assert status == 143 and last.startswith("stopped by SIGTERM after step 2 of 4; ")
    again = shlex.split(last.partition("; go on with: qlora-lite ")[2])
    assert again == [*map(str, words), str(memory_path / "run"), "--resume"]
    status, said = command(*again)
    assert status == 0 and "going on after step 2 from" in said
    assert command(*words, memory_path / "whole")[0] == 0
    ends = [(memory_path / run / "adapter/adapter_model.safetensors").read_bytes() for run in ("run", "whole")]
    assert ends[0] == ends[1]


def test_quantize_writes_what_the_other_commands_read(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    from qlora_lite import QuantConfig, load_quantized

    words = ("quantize", "--model", tiny_folder, "--output", tmp_path / "q", "--format", "fp4", "--no-double-quant")
    done = run(*words, "--max-shard-size", "20kB", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    sizes = [(tmp_path / "q" / file).stat().st_size for file in figures["files"]]
    assert figures["bytes"] == sum(sizes) and len(sizes) > 1
    expected = load_quantized(tiny_folder, QuantConfig("fp4", double_quant=False)).state_dict()
    held = load_quantized(tmp_path / "q").state_dict()
    assert held.keys() == expected.keys() and all(torch.equal(held[name], value) for name, value in expected.items())
    done = run("profile", "--model", tmp_path / "q", "--rank", 2, "--rows", 1, "--tokens", 16)
    assert done.returncode == 2 and "is packed as fp4 already; format 'nf4' was asked for" in done.stderr
    again = run(*words)
    assert again.returncode == 1 and "not empty" in again.stderr


def test_env_says_what_there_is(run: Run) -> None:
    figures = json.loads(run("env", "--json").stdout.splitlines()[-1])
    assert figures["torch"].startswith(torch.__version__.split("+")[0]) and figures["memory_bytes"] > 0


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("merge", "--model", "{m}", "--adapter", "nowhere", "--output", "{t}/o"), 1, "does not exist"),
        (("merge", "--model", "/nowhere/x", "--adapter", "a", "--output", "{t}/o"), 1, "/nowhere/x does not exist"),
        (("merge", "--model", "{m}", "--adapter", "a", "--output", "{t}/o", "--dtype", "int4"), 2, "got 'int4'"),
        (("merge", "--model", "{m}", "--adapter", "a", "--output", "{t}/o", "--verify", "no.jsonl"), 1, "no.jsonl"),
        (("train", "--model", "{m}", "--data", "nowhere.jsonl", "--output", "{t}/o"), 1, "nowhere.jsonl"),
        (("profile", "--model", "{m}", "--format", "nf5"), 2, "got 'nf5'"),
        (("profile", "--model", "{m}", "--html", "{t}/report.txt"), 2, "must be named *.html; got"),
        (("profile", "--model", "{m}", "--html", "{m}/config.json/a.html"), 1, "no folder that may be written to"),
        (("profile", "--model", "{m}", "--png", "{t}"), 2, "must be named *.png; got"),
        (
            ("quantize", "--model", "{m}", "--output", "{t}/o", "--format", "none"),
            2,
            "must be one of nf4, fp4, int8; got 'none'",
        ),
        (("profile", "--model", "{m}", "--rows", "0"), 2, "rows must be at least 1"),
        (("train", "--model", "{m}"), 2, "Missing option"),
        (("train", "--steps", "many"), 2, "Invalid value for '--steps'"),
        (("train", "--stepz", "2"), 2, "No such option: --stepz"),
        (("merge", "m", "--model", "{m}", "--adapter", "a", "--output", "{t}/o"), 2, "(m); see qlora-lite merge"),
        (("destroy",), 2, "No such command 'destroy'; see qlora-lite --help"),
    ],
)
def test_bad_input_is_one_sentence(
    run: Run, words: tuple[str, ...], status: int, message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    done = run(*(word.format(m=tiny_folder, t=tmp_path) for word in words))
    assert done.returncode == status, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
