"""The mean visual token of each image without the layer's sinks: kept only where it is not that of all tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from keepsight.diagnosis.collect.store import LayerStore

BLOCK = 4096  # images read at a time


class MeansWithoutSinks:
    """Rows that stand in for those of `pooled` where an image has sink tokens; a file for each layer with such images.

    Sink channels are 0 in what is read: that is known from the calibration, and not stored. An image that consists of
    sinks has no mean: that of the others stands for it, so that it tells nothing.

    Args:
        path: where the files go, as for `LayerStore`.
        pooled: the means over all tokens, filled beside this one.
        channels: of each layer, float [d], 0 for sink channels.
    """

    def __init__(self, path: Path, pooled: LayerStore, channels: list[Tensor]) -> None:
        self._path = path
        self._pooled = pooled
        self._channels = [one.cpu().numpy() for one in channels]
        self._stores: dict[int, LayerStore] = {}
        self._empty = [0] * len(channels)

    def append(self, rows: Tensor, sinks: Tensor) -> None:
        """rows: [m, d], of the images that have sink tokens, layer after layer; sinks: [L, B], how many each has."""
        for position, some in enumerate(rows.split((sinks > 0).sum(dim=1).tolist())):
            if len(some):
                if position not in self._stores:
                    path = self._path.with_name(f"{self._path.name}-{position}")
                    self._stores[position] = LayerStore(path, 1, self._pooled.width)
                self._stores[position].append(some[None])
                self._empty[position] += int(some.isnan().any(dim=1).sum())

    def differ(self, position: int) -> bool:
        """Whether the layer in this position has sink tokens or sink channels."""
        return position in self._stores or not self._channels[position].all()

    def note(self, position: int) -> str:
        """What is to be said of the layer in this position."""
        empty = self._empty[position]
        return f"{empty} images are sinks only: the mean of the others stands for theirs" if empty else ""

    def rows_of(self, position: int, rows: np.ndarray, sinks: np.ndarray) -> RowsWithoutSinks:
        """The means of these images; sinks: [n], how many sink tokens each of all n images has in the layer."""
        kept = sinks.nonzero()[0], self._stores.get(position)
        read = RowsWithoutSinks(self._pooled, position, rows, *kept, self._channels[position])
        if self._empty[position]:
            everything = RowsWithoutSinks(
                self._pooled, position, np.arange(len(sinks)), *kept, self._channels[position]
            )
            read.instead = everything.mean()
        return read


class RowsWithoutSinks:
    """Means without sinks of one layer as an array [n, d] that lies on the disk.

    rows: [n], which images; heavy: [m], rising, those that `store` holds; instead: [d], in the place of NaN.
    """

    def __init__(
        self,
        pooled: LayerStore,
        position: int,
        rows: np.ndarray,
        heavy: np.ndarray,
        store: LayerStore | None,
        channels: np.ndarray,
    ) -> None:
        self.pooled, self.position, self.rows = pooled, position, rows
        self.heavy, self.store, self.channels = heavy, store, channels
        self.instead = np.full(pooled.width, np.nan, np.float32)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), self.pooled.width

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        rows = self.rows[index]
        found = self.pooled.gather(self.position, rows)
        if self.store is not None:
            at = np.searchsorted(self.heavy, rows).clip(max=len(self.heavy) - 1)
            replaced = self.heavy[at] == rows
            found[replaced] = self.store.gather(0, at[replaced])
            found[np.isnan(found).any(axis=1)] = self.instead
        found *= self.channels
        return found

    def mean(self) -> np.ndarray:
        """[d] over the images that have a mean; 0 without any."""
        total, count = np.zeros(self.pooled.width), 0
        for start in range(0, len(self.rows), BLOCK):
            block = self[start : start + BLOCK]
            defined = ~np.isnan(block).any(axis=1)
            total += block[defined].sum(axis=0, dtype=np.float64)
            count += int(defined.sum())
        return (total / max(count, 1)).astype(np.float32)
