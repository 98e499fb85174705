"""Calibration: codes and statistics of a 4-bit base chosen by text, in the same bytes and the same files.

In reading order:

code_grid         what a block can hold: code values, and absmax of both signs
input_products    products of a layer's inputs, and the order of its columns
error_feedback    codes and absmax of one weight, by the error of the layer's output
layer_inputs      the inputs of a block's layers while text runs through it
block_chain       a model run block by block
kept_blocks       packed blocks on disk, for a calibration that is stopped
block_packing     a block read, packed for its inputs, and run
held_out          packed models compared with the 16-bit one on other text
report            the figures, as a table and as calibration.json
windows           rows of text of one length, from examples
from_checkpoint   calibrate and calibrated_model, from a checkpoint's folder
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.calibration.from_checkpoint import calibrate as calibrate
    from qlora_lite.calibration.from_checkpoint import calibrated_model as calibrated_model
    from qlora_lite.calibration.report import CalibrationReport as CalibrationReport
    from qlora_lite.calibration.windows import text_windows as text_windows

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {"from_checkpoint": "calibrate calibrated_model", "report": "CalibrationReport", "windows": "text_windows"},
)
