"""Patch × patch similarities of a picture at every layer, small enough to be put into a report.

All cosines of 576 patches at 33 layers are 44 MB in float32. But a matrix of cosines of N patches is U Uᵀ, and the
spectrum of visual tokens falls fast: a few eigenvectors of it, in int8, give the same picture. They are the best that
so many numbers a patch can do (Eckart and Young 1936; a random projection of as many loses much more), and what they
lose is measured and kept beside them. 30 pictures × 33 layers × 576 patches × 24 bytes = 13.7 MB, 18.2 MB in base64.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, fields

import numpy as np

COMPONENTS = 24


@dataclass(frozen=True)
class SimilarityMap:
    """Cosines between the N visual tokens of one picture at L layers.

    layers: int [L], layer indices; codes: int8 [L, N, K]; scales: float32 [L, K], of one step of each component;
    error: float32 [L], root mean square of the cosines' errors over pairs of different tokens; worst: float32 [L], the
    largest of them; centres: float32 [N, 2], (x, y) of each token's centre in shares of the picture's width and height,
    NaN for tokens of padding alone; tile: int16 [N]; row, column: int16 [N], within the tile.

    A reader computes the cosine of tokens i and j at layer l as Σ_k (s_k c_ik)(s_k c_jk), cut to -1 … 1.
    """

    layers: np.ndarray
    codes: np.ndarray
    scales: np.ndarray
    error: np.ndarray
    worst: np.ndarray
    centres: np.ndarray
    tile: np.ndarray
    row: np.ndarray
    column: np.ndarray

    def similarity(self, layer: int, token: int) -> np.ndarray:
        """float32 [N]: cosines of one token with all, at a layer index.

        Raises:
            ValueError: the map has no such layer or token.
        """
        found = np.flatnonzero(self.layers == layer)
        if not len(found) or not 0 <= token < self.codes.shape[1]:
            raise ValueError(
                f"layer {layer}, token {token}: allowed are the layers {self.layers.tolist()} and tokens 0 to "
                f"{self.codes.shape[1] - 1}"
            )
        parts = self.codes[found[0]].astype(np.float32) * self.scales[found[0]]
        cosines = parts @ parts[token]
        cosines[token] = 1.0
        return cosines.clip(-1.0, 1.0)

    def to_bytes(self) -> bytes:
        """As a compressed npz file."""
        file = io.BytesIO()
        np.savez_compressed(file, **{field.name: getattr(self, field.name) for field in fields(self)})
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> SimilarityMap:
        """What `to_bytes` gave.

        Raises:
            ValueError: it is damaged, or something else.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                return cls(**{field.name: file[field.name] for field in fields(cls)})
        except Exception as cause:  # zipfile, zlib and NumPy raise many kinds
            raise ValueError(f"not a similarity map, or a damaged one ({cause}); diagnose again") from cause


def compress(tokens: np.ndarray, components: int = COMPONENTS) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Tokens [N, d] of one layer → codes int8 [N, K], scales float32 [K], and the two errors (see `SimilarityMap`).

    A zero token has cosine 0 with all. Where N is below K, the last components are zero.
    """
    unit = tokens.astype(np.float32)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    cosine = unit @ unit.T
    values, vectors = np.linalg.eigh(cosine.astype(np.float64))
    count = min(components, len(values))
    largest = slice(len(values) - 1, -count - 1 if count < len(values) else None, -1)
    parts = np.zeros((len(unit), components))
    parts[:, :count] = vectors[:, largest] * np.sqrt(np.maximum(values[largest], 0.0))
    scales = np.abs(parts).max(axis=0) / 127
    codes = np.rint(parts / np.where(scales > 0, scales, 1.0)).astype(np.int8)
    again = codes * scales
    difference = np.abs((again @ again.T).clip(-1, 1) - cosine)[~np.eye(len(unit), dtype=bool)]
    if not len(difference):
        return codes, scales.astype(np.float32), 0.0, 0.0
    return codes, scales.astype(np.float32), float(np.sqrt((difference**2).mean())), float(difference.max())
