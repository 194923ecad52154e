"""Rows that grow with the number of pictures go to disk, so that memory does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from keepsight.results import StorageError


class LayerStore:
    """Append-only files of float32 rows of `width` numbers, one file a layer, one row a picture or token."""

    def __init__(self, path: Path, layers: int, width: int) -> None:
        self.rows = 0
        self.width = width
        self._paths = [path.with_name(f"{path.name}-{layer}.f32") for layer in range(layers)]
        self._files = [file.open("wb", buffering=0) for file in self._paths]

    def append(self, block: Tensor) -> None:
        """Add block [layers, rows, width]."""
        for layer, rows in enumerate(block):
            self.put(layer, rows)
        self.commit(block.shape[1])

    def put(self, layer: int, rows: Tensor) -> None:
        """Rows [rows, width] of the layer in position `layer`; they count once `commit` says so for all layers.

        Raises:
            StorageError: the disk is full.
        """
        data = rows.to(device="cpu", dtype=torch.float32).contiguous().numpy()
        file = self._files[layer]
        file.seek(4 * self.rows * self.width)
        view = data.data.cast("B") if data.size else memoryview(b"")
        try:
            while view:
                view = view[file.write(view) :]
        except OSError as cause:
            error = StorageError(
                f"the temporary folder '{self._paths[layer].parent}' cannot take what comes from the model "
                f"({cause.strerror}); set TMPDIR to a folder on a larger disk"
            )
            error.errno = cause.errno
            raise error from cause

    def commit(self, rows: int) -> None:
        """So many rows were put into every layer."""
        self.rows += rows

    def read(self, layer: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` (all by default) of the layer in position `layer`: [rows, width]."""
        count = (self.rows if stop is None else min(stop, self.rows)) - start
        read = np.fromfile(self._paths[layer], np.float32, count * self.width, offset=4 * start * self.width)
        return read.reshape(count, self.width)

    def gather(self, layer: int, rows: np.ndarray) -> np.ndarray:
        """These rows of the layer in position `layer`, in any order: [len(rows), width]."""
        if not len(rows):
            return np.empty((0, self.width), np.float32)
        return np.asarray(np.memmap(self._paths[layer], np.float32, "r", shape=(self.rows, self.width))[rows])

    def rows_of(self, layer: int, rows: np.ndarray) -> StoredRows:
        """These rows of the layer in position `layer`, read as they are asked for."""
        return StoredRows(self, layer, rows)

    def close(self) -> None:
        for file in self._files:
            file.close()


class StoredRows:
    """Rows of a `LayerStore` as an array [n, width] that lies on the disk."""

    def __init__(self, store: LayerStore, layer: int, rows: np.ndarray) -> None:
        self.store, self.layer, self.rows = store, layer, rows

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), self.store.width

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        return self.store.gather(self.layer, self.rows[index])
