"""Tests of the options of commands that answer, and of the model that they load."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_lite.cli.generation.talkers import adapters_in_words, generation_settings, load_talker, named_adapters
from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.quantization.kernels import bnb


def test_adapters_are_named_by_their_runs_or_as_told(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("my run/adapter", "b", "c=d")]
    for folder in folders:
        folder.mkdir(parents=True)
    named = named_adapters([str(folders[0]), f"polite={folders[1]}", str(folders[2])])
    assert named == {"my-run": folders[0], "polite": folders[1], "c-d": folders[2]}
    with pytest.raises(ConfigError, match=r"'b' names .*/b already; name it otherwise, as --adapter second=.*/b"):
        named_adapters([str(folders[1])] * 2)
    with pytest.raises(ConfigError, match="'off' means no adapter; name it otherwise"):
        named_adapters([f"off={folders[1]}"])
    with pytest.raises(CheckpointError, match=r"/x is not a folder; name that of an adapter"):
        named_adapters([str(tmp_path / "x")])
    with pytest.raises(CheckpointError, match=r"/my rum/adapter is not a .*; did you mean \S+/my run/adapter\?$"):
        named_adapters([str(tmp_path / "my rum/adapter")])


def test_the_adapter_in_use_has_a_star() -> None:
    assert adapters_in_words(["a", "b"], "b") == "a, b*, off" and adapters_in_words([], None) == "off*"


def test_answers_are_half_of_the_positions_at_most(
    tiny_folder: Path, small_model: Callable[..., Any], tmp_path: Path
) -> None:
    options = {"max_new_tokens": None, "temperature": 0.5, "top_p": None, "top_k": 4, "seed": 1}
    made = generation_settings(options, str(tiny_folder))
    assert (made.max_new_tokens, made.temperature, made.top_k, made.seed) == (512, 0.5, 4, 1)
    small_model("LlamaConfig", max_position_embeddings=64).save_pretrained(tmp_path / "m")
    assert generation_settings(options, str(tmp_path / "m")).max_new_tokens == 32
    assert generation_settings({**options, "max_new_tokens": 60}, str(tmp_path / "m")).max_new_tokens == 60


def test_a_model_that_does_not_answer_is_refused_before_it_is_read(tmp_path: Path) -> None:
    import transformers

    config = transformers.T5Config(vocab_size=32, d_model=8, architectures=["T5ForConditionalGeneration"])
    config.save_pretrained(tmp_path / "t5")
    options = {"model": str(tmp_path / "t5"), "adapter": None, "skip_modules": None, "base_in": "memory"}
    with pytest.raises(ConfigError, match=r"t5 is made for seq2seq-lm; only causal language models write answers here"):
        load_talker(options)


def test_an_adapter_that_does_not_fit_is_refused_before_the_model_is_read(
    run: Callable[..., Any], tiny_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    """The folder of the model has no weights, whose lack would be told else."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_folder / name).read_bytes())
    for given, sentence in (
        (adapter.parent, "has no adapter_config.json; name an adapter in it: "),
        (tiny_folder, "adapter_config.json does not exist"),
    ):
        done = run("chat", "--model", tmp_path, "--adapter", given, stdin="hello\n")
        assert done.returncode == 1 and sentence in done.stderr and len(done.stderr.splitlines()) == 1


COMMANDS = {
    "chat": (),
    "generate": ("--prompts", "p.txt", "--output", "a.jsonl"),
    "serve": ("--port", 0),
}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_copies_without_weights_for_them_are_refused(
    run: Callable[..., Any], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("hello\n", encoding="utf-8")
    words = (command, "--model", tiny_folder, "--format", "int8", *COMMANDS[command], "--decode-copies")
    done = run(*words, stdin="hello\n") if command == "chat" else run(*words)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: --decode-copies makes copies of 4-")
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]


@pytest.mark.skipif(not bnb.has_avx512bf16(), reason="bitsandbytes' kernel needs AVX512-BF16")
def test_copies_are_held_and_their_bytes_told(
    run: Callable[..., subprocess.CompletedProcess[str]], tiny_folder: Path, adapter: Path, memory_path: Path
) -> None:
    words = ("--model", tiny_folder, "--adapter", adapter, "--max-new-tokens", 4, "--decode-copies", "--json")
    chatted = run("chat", *words, stdin="hello\n/adapter off\nhello\n")
    assert chatted.returncode == 0 and chatted.stderr == "copies of codes: 38.2 KiB\n"
    assert [json.loads(line)["tokens"] for line in chatted.stdout.splitlines()] == [4, 4]
    prompts, output = memory_path / "p.txt", memory_path / "a.jsonl"
    prompts.write_text("hello\n", encoding="utf-8")
    written = run("generate", *words, "--prompts", prompts, "--output", output)
    assert written.returncode == 0 and written.stderr == chatted.stderr
    assert json.loads(output.read_text(encoding="utf-8"))["tokens"] == 4
