"""Do two representations of the same images place them alike? Debiased linear CKA and mutual nearest neighbours.

CKA: Kornblith et al. 2019 (arXiv:1905.00414) with the unbiased HSIC of Song et al. 2012, which is zero in the mean for
unrelated representations whatever their widths. Mutual k-nearest-neighbour agreement: Huh et al. 2024
(arXiv:2405.07987); centring before the cosine is ours, because tokens share a large direction.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from keepsight.diagnosis.accumulate import Accumulator
from keepsight.diagnosis.spectrum import GROUPS, jackknife
from keepsight.results import Measurement
from keepsight.results.intervals import Estimate, mean_interval

IMAGES = 2000  # at most, a seeded subset: the Gram matrices are images × images
NEIGHBOURS = 10
FEWEST = 2 * GROUPS  # images for the intervals' groups to be whole
PERMUTED = "permuted images"


def hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741 - the names of the paper
    """Unbiased HSIC of two Gram matrices [n, n] whose diagonals are zero, n ≥ 4 (Song et al. 2012, eq. 5)."""
    n = k.shape[0]
    rows_k, rows_l = k.sum(dim=1), l.sum(dim=1)
    sums = rows_k.sum() * rows_l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows_k @ rows_l)
    return ((k * l).sum() + sums) / (n * (n - 3))


def debiased_cka(k: Tensor, l: Tensor) -> float:  # noqa: E741
    """HSIC(K, L) / √(HSIC(K, K) · HSIC(L, L)) of Gram matrices with zero diagonals; NaN where one does not vary."""
    within = hsic(k, k) * hsic(l, l)
    return float(hsic(k, l) / within.sqrt()) if within > 0 else float("nan")


def gram(x: Tensor) -> Tensor:
    """[n, n] float64 inner products of the rows of x [n, d], with a zero diagonal."""
    x = x.double()
    x = x - x.mean(dim=0)  # changes no HSIC, and keeps its terms from being differences of large numbers
    return (x @ x.T).fill_diagonal_(0.0)


def neighbours(x: Tensor, k: int) -> Tensor:
    """bool [n, n]: whether column j is among the k rows most similar to row i, by the cosine of centred rows."""
    unit = torch.nn.functional.normalize((x - x.mean(dim=0)).double(), dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-2.0)
    nearest = cosine.topk(k, dim=1).indices
    return torch.zeros_like(cosine, dtype=torch.bool).scatter_(1, nearest, True)


def neighbour_agreement(x: Tensor, y: Tensor, k: int) -> Tensor:
    """[n]: share of the k nearest neighbours of each row that x [n, d] and y [n, d'] share. Chance: k/(n−1)."""
    return (neighbours(x, k) & neighbours(y, k)).sum(dim=1).double() / k


class Similarity:
    """Each layer's pooled features against the vision encoder's, over the images."""

    def __init__(self, accumulator: Accumulator, seed: int) -> None:
        self.accumulator = accumulator
        self.seed = seed
        n = accumulator.pooled.rows
        generator = np.random.default_rng([seed, 8])
        self.images = np.sort(generator.permutation(n)[:IMAGES])
        count = len(self.images)
        self.group = generator.permutation(count) % GROUPS
        self.k = max(1, min(NEIGHBOURS, (count - 1) // 4))
        self.why = accumulator.no_encoder if accumulator.encoder_pooled is None else ""
        if not self.why and count < FEWEST:
            self.why = f"{count} images are too few; at least {FEWEST} are needed"
        if not self.why:
            assert accumulator.encoder_pooled is not None
            self.encoder = torch.from_numpy(accumulator.encoder_pooled.read(0)[self.images])
            self.gram = gram(self.encoder)
            self.near = neighbours(self.encoder, self.k)
            self.shuffled = torch.from_numpy(generator.permutation(count))

    def rows(self, position: int) -> list[Measurement]:
        """CKA and neighbour agreement of the layer in this position, each with its null."""
        common: dict[str, Any] = {"layer": self.accumulator.layers[position], "n": len(self.images), "seed": self.seed}
        if self.why:
            return [Measurement(name, None, **common, note=self.why) for name in ("cka", "neighbour_agreement")]
        x = torch.from_numpy(self.accumulator.pooled.read(position)[self.images])
        grams = gram(x)
        shared = (neighbours(x, self.k) & self.near).sum(dim=1).double() / self.k
        count = len(self.images)
        about = f"k = {self.k}"
        mixed = self.gram[self.shuffled][:, self.shuffled]
        null: dict[str, Any] = {"variant": PERMUTED, **common}
        return [
            Measurement("cka", **self._cka(grams, self.gram).fields, **common),
            Measurement("cka", **self._cka(grams, mixed).fields, **null),
            Measurement("neighbour_agreement", **mean_interval(shared.numpy()).fields, **common, note=about),
            Measurement("neighbour_agreement", self.k / (count - 1), **null, note=f"{about}; its expectation"),
        ]

    def _cka(self, k: Tensor, l: Tensor) -> Estimate:  # noqa: E741
        value = debiased_cka(k, l)
        without, sizes = [], []
        for g in range(GROUPS):
            kept = torch.from_numpy(np.flatnonzero(self.group != g))
            without.append(debiased_cka(k[kept][:, kept], l[kept][:, kept]))
            sizes.append(float((self.group == g).sum()))
        interval = jackknife(value, without, sizes, log=False)
        return Estimate(value, *(interval or (None, None)))
