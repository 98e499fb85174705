"""The models of `examples/`, for the scripts in `profiling/`: a random one, and SmolLM2-135M-Instruct."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from real_model import cache_folder, fetch_model
from tiny_model import make_tiny_model

__all__ = ["cache_folder", "fetch_model", "make_tiny_model", "model_folder"]


def model_folder(tiny: bool, scratch: Path) -> Path:
    """Returns the folder of a random model of two small layers, made in `scratch`, or of SmolLM2-135M-Instruct."""
    return make_tiny_model(scratch / "tiny") if tiny else fetch_model()
