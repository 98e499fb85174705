"""The packed blocks of a calibration that is not finished, on disk, so that it goes on where it was stopped.

    folder/key.json              what the blocks depend on: text, settings, checkpoint, versions
    folder/0007.safetensors      codes, statistics and errors of the layers of block 7 that were packed with feedback

A file gets its name once it is complete. Packing is the same in each run, so a calibration that reads some blocks ends
with the bytes of one that packed all.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlora_lite.calibration.report import LayerErrors
from qlora_lite.checkpoints.files import read_json, rename, sync, write_json
from qlora_lite.checkpoints.safetensors_read import read_safetensors
from qlora_lite.checkpoints.safetensors_write import planned, write_safetensors
from qlora_lite.errors import CheckpointError
from qlora_lite.quantization.packed_weight import PackedWeight

KEY_FILE = "key.json"
ERRORS = "errors"


@dataclass(frozen=True)
class KeptLayer:
    """The buffers of a packed weight by name, and the errors of the layer."""

    buffers: Mapping[str, Tensor]
    errors: LayerErrors


@dataclass(frozen=True)
class KeptBlocks:
    """A folder of packed blocks. key: what they depend on; blocks of another key are not read."""

    folder: Path
    key: Mapping[str, object]

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:04d}.safetensors"

    def open(self) -> None:
        """Removes what another calibration has left in the folder."""
        if self.folder.is_dir():
            path = self.folder / KEY_FILE
            if not path.is_file() or read_json(path) != dict(self.key):
                shutil.rmtree(self.folder)

    def read(self, number: int) -> dict[str, KeptLayer] | None:
        """Returns the layers of a block by name, None if it is not there. Raises CheckpointError for a damaged file."""
        if not self._path(number).is_file():
            return None
        tensors: dict[str, dict[str, Tensor]] = {}
        for key, tensor in read_safetensors(self._path(number)).items():
            name, _, buffer = key.rpartition(":")
            tensors.setdefault(name, {})[buffer] = tensor
        try:
            return {
                name: KeptLayer(buffers, LayerErrors(*buffers.pop(ERRORS).tolist()))
                for name, buffers in tensors.items()
            }
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{self._path(number)} is damaged; delete {self.folder} to begin anew") from error

    def write(self, number: int, layers: Mapping[str, tuple[PackedWeight, LayerErrors]]) -> None:
        """Writes a block."""
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            write_json(self.folder / KEY_FILE, dict(self.key))
        tensors: dict[str, Tensor] = {}
        for name, (packed, errors) in layers.items():
            tensors |= {f"{name}:{buffer}": value for buffer, value in packed.state_dict().items()}
            tensors[f"{name}:{ERRORS}"] = torch.tensor([errors.rounded, errors.calibrated], dtype=torch.float64)
        unfinished = self._path(number).with_suffix(".unfinished")
        write_safetensors(unfinished, {name: planned(tensor) for name, tensor in tensors.items()})
        rename(unfinished, self._path(number))
        sync(self.folder)
