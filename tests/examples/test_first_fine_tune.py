"""Runs the notebook in a kernel of its own, with its small setting, and reads the outputs that it is stored with."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOK = EXAMPLES / "first_fine_tune.ipynb"


def texts(notebook: Any) -> str:
    """Returns all that the cells printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def held_out_losses(text: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"held-out loss (\d+\.\d+)", text)]


@pytest.fixture(scope="module")
def stored() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_every_cell_runs_on_a_tiny_model(stored: Any) -> None:
    notebook = copy.deepcopy(stored)
    setting = next(cell for cell in notebook.cells if cell.source == "TINY = False")
    setting.source = "TINY = True"
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    printed = texts(notebook)
    losses = held_out_losses(printed)
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert "adapter_model.safetensors" in printed and "Ship the" in printed


def test_it_is_stored_with_the_outputs_of_a_real_run(stored: Any) -> None:
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    printed = texts(stored)
    losses = held_out_losses(printed)
    assert losses[-1] < 0.5 * losses[0]
    assert "/home" not in printed and "/root" not in printed and "/tmp" not in printed
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
