"""Rows that grow with the number of pictures go to disk, so that memory does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BLOCK = 4 << 20  # bytes read at a time


class LayerStore:
    """An append-only file of float32 rows [layers, width], one row a picture or token."""

    def __init__(self, path: Path, layers: int, width: int) -> None:
        self.rows = 0
        self._shape = (layers, width)
        self._path = path
        self._file = path.open("wb", buffering=0)

    def append(self, block: Tensor) -> None:
        """Add block [layers, rows, width]."""
        data = block.transpose(0, 1).to(device="cpu", dtype=torch.float32).contiguous().numpy()
        view = memoryview(data.tobytes())
        while view:
            view = view[self._file.write(view) :]
        self.rows += data.shape[0]

    def read(self, layer: int) -> np.ndarray:
        """[rows, width] of the layer in position `layer`, read block by block: the file itself is never in memory."""
        layers, width = self._shape
        result = np.empty((self.rows, width), dtype=np.float32)
        step = max(1, BLOCK // (4 * layers * width))
        with self._path.open("rb") as file:
            for start in range(0, self.rows, step):
                count = min(step, self.rows - start) * layers * width
                block = np.fromfile(file, dtype=np.float32, count=count).reshape(-1, layers, width)
                result[start : start + step] = block[:, layer]
        return result

    def close(self) -> None:
        self._file.close()
