"""The mean visual token of each image without the layer's sinks: kept only where it is not that of all tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from keepsight.diagnosis.store import LayerStore


class MeansWithoutSinks:
    """Rows that stand in for those of `pooled` where an image has sink tokens; a file for each layer with such images.

    Sink channels are 0 in what is read: that is known from the calibration, and not stored.

    Args:
        path: where the files go, as for `LayerStore`.
        pooled: the means over all tokens, filled beside this one.
        channels: of each layer, float [d], 0 for sink channels.
    """

    def __init__(self, path: Path, pooled: LayerStore, channels: list[Tensor]) -> None:
        self._path = path
        self._pooled = pooled
        self._channels = channels
        self._stores: dict[int, LayerStore] = {}

    def append(self, rows: Tensor, sinks: Tensor) -> None:
        """rows: [m, d], of the images that have sink tokens, layer after layer; sinks: [L, B], how many each has."""
        for position, some in enumerate(rows.split((sinks > 0).sum(dim=1).tolist())):
            if len(some):
                if position not in self._stores:
                    self._stores[position] = LayerStore(
                        self._path.with_name(f"{self._path.name}-{position}"), 1, self._pooled.width
                    )
                self._stores[position].append(some[None])

    def differ(self, position: int) -> bool:
        """Whether the layer in this position has sink tokens or sink channels."""
        return position in self._stores or not bool(self._channels[position].all())

    def read(self, position: int, sinks: np.ndarray) -> tuple[Tensor, str]:
        """[n, d] of the layer in this position, and what is to be said of it; sinks: [n], each image's sink tokens.

        An image that consists of sinks has no mean: that of the others stands for it, so that it tells nothing.
        """
        x, note = self._pooled.read(position), ""
        if position in self._stores:
            rows, at = self._stores[position].read(0), np.flatnonzero(sinks)
            x[at] = rows
            empty = at[np.isnan(rows).any(axis=1)]
            if len(empty):
                others = np.delete(x, empty, axis=0)
                x[empty] = others.mean(axis=0, dtype=np.float64) if len(others) else 0.0
                note = f"{len(empty)} images are sinks only: the mean of the others stands for theirs"
        return torch.from_numpy(x).mul_(self._channels[position].cpu()), note
