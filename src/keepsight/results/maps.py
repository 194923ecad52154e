"""Patch × patch similarities of a picture at every layer, small enough to be put into a report.

All cosines of 576 patches at 33 layers are 44 MB in float32. But a matrix of cosines of N patches is U Uᵀ, and the
spectrum of visual tokens falls fast: a few eigenvectors of it, in int8, give the same picture. They are the best that
so many numbers a patch can do (Eckart and Young 1936; a random projection of as many loses much more), and what they
lose is measured and kept beside them. All components count in the same steps, so that weak ones need few of the 255
values and a file that packs them is small: 30 pictures × 33 layers × 576 patches × 24 bytes are 13.7 MB, and 8 to 9 MB
deflated, which is what a report of 30 pictures carries.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field, fields

import numpy as np

COMPONENTS = 24
STEPS = 127  # of 1: the components of a unit vector are at most 1


@dataclass(frozen=True)
class SimilarityMap:
    """Cosines between the N visual tokens of one picture at L layers.

    layers: int [L], layer indices; codes: int8 [L, N, K], in steps of 1/127;
    error: float32 [L], root mean square of the cosines' errors over pairs of different tokens; worst: float32 [L], the
    largest of them; centres: float32 [N, 2], (x, y) of each token's centre in shares of the picture's width and height,
    NaN for tokens of padding alone; tile: int16 [N]; row, column: int16 [N], within the tile; thumbnail: bool [N], of
    the whole picture beside its tiles, or empty; top: int32 [L, N], which of `words` the lens reads from each token,
    both empty without a lens; words: str [W].

    A reader computes the cosine of tokens i and j at layer l as Σ_k c_ik c_jk / 127², cut to -1 … 1.
    """

    layers: np.ndarray
    codes: np.ndarray
    error: np.ndarray
    worst: np.ndarray
    centres: np.ndarray
    tile: np.ndarray
    row: np.ndarray
    column: np.ndarray
    thumbnail: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    top: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int32))
    words: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=str))

    def similarity(self, layer: int, token: int) -> np.ndarray:
        """float32 [N]: cosines of one token with all, at a layer index.

        Raises:
            ValueError: the map has no such layer or token.
        """
        position = self._find(layer, token)
        parts = self.codes[position].astype(np.float32) / STEPS
        cosines = parts @ parts[token]
        cosines[token] = 1.0
        return cosines.clip(-1.0, 1.0)

    def word(self, layer: int, token: int) -> str | None:
        """What the lens reads from a token at a layer index; None where the map has no lens.

        Raises:
            ValueError: the map has no such layer or token.
        """
        position = self._find(layer, token)
        return str(self.words[self.top[position, token]]) if self.top.size else None

    def _find(self, layer: int, token: int) -> int:
        found = np.flatnonzero(self.layers == layer)
        if not len(found) or not 0 <= token < self.codes.shape[1]:
            raise ValueError(
                f"layer {layer}, token {token}: allowed are the layers {self.layers.tolist()} and tokens 0 to "
                f"{self.codes.shape[1] - 1}"
            )
        return int(found[0])

    def to_bytes(self) -> bytes:
        """As a compressed npz file."""
        file = io.BytesIO()
        np.savez_compressed(file, **{name.name: getattr(self, name.name) for name in fields(self)})
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> SimilarityMap:
        """What `to_bytes` gave.

        Raises:
            ValueError: it is damaged, or something else.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                return cls(**{name.name: file[name.name] for name in fields(cls)})
        except Exception as cause:  # zipfile, zlib and NumPy raise many kinds
            raise ValueError(f"not a similarity map, or a damaged one ({cause}); diagnose again") from cause


def compress(tokens: np.ndarray, components: int = COMPONENTS) -> tuple[np.ndarray, float, float]:
    """Tokens [N, d] of one layer → codes int8 [N, K] and the two errors (see `SimilarityMap`).

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
    codes = np.rint(STEPS * parts).clip(-STEPS, STEPS).astype(np.int8)
    again = codes / STEPS
    difference = np.abs((again @ again.T).clip(-1, 1) - cosine)[~np.eye(len(unit), dtype=bool)]
    if not len(difference):
        return codes, 0.0, 0.0
    return codes, float(np.sqrt((difference**2).mean())), float(difference.max())
