"""What every test runs under: two threads, no network, quiet libraries, and repeatable examples in CI."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# For transformers, which reads them when it is imported, and for the processes that tests start.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "2",
}
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)

torch.set_num_threads(min(2, os.cpu_count() or 1))

# A model's first call may take seconds, which says nothing about the ones after it: no deadline.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") == "true" else "local")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what is marked `gpu` where torch has no accelerator."""
    if torch.accelerator.is_available():
        return
    skip = pytest.mark.skip(reason="needs an accelerator")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _same_numbers_each_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_tiny_model() -> Callable[..., Path]:
    """examples/tiny_model.py's function."""
    specification = importlib.util.spec_from_file_location("tiny_model", ROOT / "examples" / "tiny_model.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.make_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(make_tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of examples/tiny_model.py: two Llama layers, tied embeddings, one token per character."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))
