"""Fixtures and settings of all tests: few threads, no network, quiet libraries, repeatable examples in CI."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

LONGEST_BYTES_SHOWN = 24

# On two cores: two threads in one process, or one in each of two processes of pytest-xdist.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1)

# For transformers, which reads them on import, and for the processes that tests start.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": str(THREADS),
    # Waiting threads release the core: on a shared machine, spinning costs many times the work.
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    # Choices that depended on times would make tests depend on the machine, and on how busy it is.
    "QLORA_LITE_CHOICES": "default",
}
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)

torch.set_num_threads(THREADS)

# No deadline, because the first call of a model may take seconds.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") == "true" else "local")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where torch has no accelerator."""
    if torch.accelerator.is_available():
        return
    skip = pytest.mark.skip(reason="needs an accelerator")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Names long bytes by their argument: compressed ones hold the time, and all processes must know the same tests."""
    return argname if isinstance(val, bytes) and len(val) > LONGEST_BYTES_SHOWN else None


@pytest.fixture(autouse=True)
def _same_numbers_each_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_signal_handlers() -> Iterator[None]:
    """Restores the SIGINT handler, which the command line replaces for the rest of its process."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where possible, for tests that sync many files: a busy disk takes a second for each."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def import_script() -> Callable[[str], Any]:
    """Imports a script by its path from the root. Its folder is importable meanwhile, as when the script is run."""

    def imported(path: str) -> Any:
        folder = str((ROOT / path).parent)
        sys.path.insert(0, folder)
        try:
            return importlib.import_module(Path(path).stem)
        finally:
            sys.path.remove(folder)

    return imported


@pytest.fixture(scope="session")
def make_tiny_model(import_script: Callable[[str], Any]) -> Callable[..., Path]:
    """The function of examples/tiny_model.py."""
    return import_script("examples/tiny_model.py").make_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(make_tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of examples/tiny_model.py: two Llama layers, tied embeddings, one token per character."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def make_tiny_vision_model(import_script: Callable[[str], Any]) -> Callable[..., Path]:
    """The function of examples/tiny_vision_model.py."""
    return import_script("examples/tiny_vision_model.py").make_tiny_vision_model


@pytest.fixture(scope="session")
def tiny_vision_folder(make_tiny_vision_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SmolVLM of examples/tiny_vision_model.py."""
    return make_tiny_vision_model(tmp_path_factory.mktemp("vision") / "smolvlm")


@pytest.fixture(scope="session")
def read_html(import_script: Callable[[str], Any]) -> Callable[[str], Any]:
    """Returns the function of tests/html_elements.py, which parses a page and checks that it is well formed."""
    return import_script("tests/html_elements.py").read


# For every family: a config uses the sizes that it knows and keeps the others as they are.
SMALL_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session")
def small_model() -> Callable[..., Any]:
    """Returns a random model of transformers for a config class and sizes, equal in each call."""

    def make(family: str, **sizes: Any) -> Any:
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, family)(**{**SMALL_SIZES, **sizes})
        return transformers.AutoModelForCausalLM.from_config(config).eval()

    return make


@pytest.fixture
def stand_in_hub(import_script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stand-in for the hub (tests/stand_in_hub.py), which the client in this process asks, with an empty cache."""
    from huggingface_hub import constants

    hub = import_script("tests/stand_in_hub.py").StandInHub()
    server = hub.start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # uploads go through its HTTP interface
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield hub
    server.shutdown()
    server.server_close()


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv.pop(1))
from kill_points import arm
arm(int(sys.argv.pop(1)), Path(sys.argv.pop(1)))
"""


@pytest.fixture(scope="session")
def command_server(import_script: Callable[[str], Any]) -> Iterator[Any]:
    """Runs commands and programs as processes that need no imports (command_server.py)."""
    server = import_script("tests/command_server.py").CommandServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def start_processes(command_server: Any) -> Callable[..., list[subprocess.Popen[str]]]:
    """Starts a script in several processes of one run, as a launcher does; their outputs are pipes."""

    def start(count: int, script: Path, *words: object, **environment: str) -> list[subprocess.Popen[str]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        shared |= {"PYTHONPATH": str(ROOT), **environment}
        command = [command_server.python, str(script), *map(str, words)]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ranks = [{**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        return [subprocess.Popen(command, env=own, **pipes) for own in ranks]

    return start


@pytest.fixture(scope="session")
def run_processes(start_processes: Callable[..., list[subprocess.Popen[str]]]) -> Callable[..., list[Any]]:
    """Runs a program text in several processes of one run; returns the JSON of the last line that each printed."""

    def run(count: int, program: str, folder: Path, *words: object) -> list[Any]:
        script = folder / "program.py"
        script.write_text(program)
        ended = [(process, *process.communicate(timeout=120)) for process in start_processes(count, script, *words)]
        for process, _, complaint in ended:
            assert process.returncode == 0, complaint[-3000:]
        return [json.loads(printed.splitlines()[-1]) for _, printed, _ in ended]

    return run


@pytest.fixture(scope="session")
def killed_while_writing(command_server: Any) -> Callable[..., None]:
    """Runs a program with arguments that is killed at change number `point` below a folder."""

    def run(point: int, below: Path, program: str, *words: object) -> None:
        arguments = [str(ROOT / "tests" / "reliability"), str(point), str(below), *map(str, words)]
        done = command_server.run(*arguments, program=KILLED + program)
        assert done.returncode == -signal.SIGKILL, done.stderr

    return run


@pytest.fixture(scope="session")
def run(command_server: Any) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `qlora-lite` with these arguments as a process."""
    return command_server.run


@pytest.fixture(scope="session")
def word_tokenizer() -> Callable[..., Any]:
    """Makes a tokenizer of the words user, assistant, a, b, c, d, with a chat template that ends turns with </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    written = "{% for m in messages %}{{ m.role + ' ' + m.content + ' </s> ' }}{% endfor %}"

    def made(template: str | None = written, more: str = "") -> Any:
        names = ["</s>", "user", "assistant", "a", "b", "c", "d", "?", *more.split()]
        core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(names)}, unk_token="?"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        core.add_special_tokens(["</s>"])
        return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", chat_template=template)

    return made
