"""Imports the random model of `examples/tiny_model.py` for the scripts of this folder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from tiny_model import make_tiny_model

__all__ = ["make_tiny_model"]
