"""Do two representations of the same images place them alike? Debiased linear CKA and mutual nearest neighbours.

CKA: Kornblith et al. 2019 (arXiv:1905.00414) with the unbiased HSIC of Song et al. 2012, which is zero in the mean for
unrelated representations whatever their widths. Mutual k-nearest-neighbour agreement: Huh et al. 2024
(arXiv:2405.07987); centring before the cosine is ours, because tokens share a large direction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keepsight.diagnosis.collect.accumulate import Accumulator
from keepsight.diagnosis.metrics.spectrum import GROUPS, jackknife
from keepsight.results import Measurement, PerImageBuilder
from keepsight.results.intervals import Estimate, mean_interval

IMAGES = 500  # at most, a seeded subset: the Gram matrices are images × images
NEIGHBOURS = 10
FEWEST = 2 * GROUPS  # images for the intervals' groups to be whole
PERMUTED = "permuted images"


@dataclass(frozen=True)
class Gram:
    """Inner products of n centred representations, with a zero diagonal, and their sums over groups of images.

    products: [n, n]; norms: [n]; member: [n, G], 1 where the image is in the group; rows: [n, G], each row's sum over
    each group.
    """

    products: Tensor
    norms: Tensor
    member: Tensor
    rows: Tensor

    @classmethod
    def of(cls, x: Tensor, group: np.ndarray | None = None) -> Gram:
        """x: [n, d]; group: [n], 0 … G − 1, of each; one group if there are none."""
        x = x.double()
        x = x - x.mean(dim=0)  # changes no HSIC, and keeps its terms from being differences of large numbers
        products = x @ x.T
        norms = products.diagonal().clamp(min=0).sqrt()
        products.fill_diagonal_(0.0)
        groups = torch.zeros(len(x), dtype=torch.long) if group is None else torch.from_numpy(group)
        member = torch.nn.functional.one_hot(groups).double()
        return cls(products, norms, member, products @ member)

    def take(self, order: Tensor) -> Gram:
        """The images in another order, the groups as they were."""
        products = self.products[order][:, order]
        return Gram(products, self.norms[order], self.member, products @ self.member)

    def neighbours(self, k: int) -> Tensor:
        """[n, k]: the k most similar others of each image, by the cosine of the centred rows."""
        cosine = self.products / self.norms[:, None].clamp(min=1e-300) / self.norms.clamp(min=1e-300)
        return cosine.fill_diagonal_(-2.0).topk(k, dim=1, sorted=False).indices


def hsic(k: Gram, l: Gram) -> Tensor:  # noqa: E741 - the names of the paper
    """Unbiased HSIC (Song et al. 2012, eq. 5): [1 + G], of all images, then without each group; n ≥ 4 of each.

    All from sums over groups, so that the delete-one-group values cost next to nothing.
    """
    blocks = k.member.T @ ((k.products * l.products) @ k.member)  # [G, G]
    trace = torch.cat([blocks.sum()[None], blocks.sum() - blocks.sum(dim=0) - blocks.sum(dim=1) + blocks.diagonal()])
    everyone = torch.ones(1, k.member.shape[0], dtype=torch.float64)
    kept = torch.cat([everyone, 1 - k.member.T])  # [1 + G, n]
    rows_k, rows_l = (
        torch.cat([gram.rows.sum(dim=1)[None], gram.rows.sum(dim=1) - gram.rows.T]) * kept for gram in (k, l)
    )
    n = kept.sum(dim=1)
    sums = rows_k.sum(dim=1) * rows_l.sum(dim=1) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows_k * rows_l).sum(dim=1)
    return (trace + sums) / (n * (n - 3))


def debiased_cka(k: Gram, l: Gram) -> Tensor:  # noqa: E741
    """HSIC(K, L) / √(HSIC(K, K) · HSIC(L, L)): [1 + G] as in `hsic`; NaN where one does not vary."""
    return hsic(k, l) / (hsic(k, k) * hsic(l, l)).sqrt()


def agreement(near: Tensor, other: Tensor) -> Tensor:
    """[n]: share of the k neighbours [n, k] of each image that two lists have in common. Chance: k/(n − 1)."""
    return (near[:, :, None] == other[:, None, :]).sum(dim=(1, 2)).double() / near.shape[1]


class Similarity:
    """Each layer's pooled features against the vision encoder's, over the images."""

    def __init__(self, accumulator: Accumulator, per_image: PerImageBuilder, seed: int) -> None:
        self.accumulator = accumulator
        self.per_image = per_image  # takes what each image adds to the neighbours' agreement
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
            encoder = torch.from_numpy(accumulator.encoder_pooled.read(0)[self.images])
            self.gram = Gram.of(encoder, self.group)
            self.near = self.gram.neighbours(self.k)
            self.mixed = self.gram.take(torch.from_numpy(generator.permutation(count)))
            self.within = {id(gram): hsic(gram, gram) for gram in (self.gram, self.mixed)}

    def rows(self, position: int) -> list[Measurement]:
        """CKA and neighbour agreement of the layer in this position, with sinks and without, each with its null."""
        layer = self.accumulator.layers[position]
        if self.why:
            common: dict[str, Any] = {"layer": layer, "n": len(self.images), "seed": self.seed, "note": self.why}
            return [Measurement(name, None, **common) for name in ("cka", "neighbour_agreement")]
        found = self._measure(self.accumulator.pooled.gather(position, self.images), layer)
        bare = found
        if self.accumulator.bare.differ(position):
            x, said = self.accumulator.without_sinks(position, self.images)[:], self.accumulator.bare.note(position)
            bare = self._measure(x, layer, said)
        rows = []
        for tokens, measured in (("all", found), ("without sinks", bare)):
            for measurement, each in measured:
                rows.append(replace(measurement, tokens=tokens))
                if each is not None:
                    self.per_image.add(rows[-1].key, each, self.images)
        return rows

    def _measure(self, x: np.ndarray, layer: int, said: str = "") -> list[tuple[Measurement, np.ndarray | None]]:
        """The rows of mean tokens x [n, d], each with what every image adds to it (None: not kept by image)."""
        common: dict[str, Any] = {"layer": layer, "n": len(self.images), "seed": self.seed}
        own = Gram.of(torch.from_numpy(x), self.group)
        within = hsic(own, own)
        shared = agreement(own.neighbours(self.k), self.near).numpy()
        about, chance = f"k = {self.k}", self.k / (len(self.images) - 1)
        null: dict[str, Any] = {"variant": PERMUTED, **common}
        expected = f"{about}; its expectation"
        about = "; ".join(filter(None, [about, said]))
        return [
            (self._row(own, within, self.gram, common, said), None),
            (self._row(own, within, self.mixed, null), None),
            (Measurement("neighbour_agreement", **mean_interval(shared).fields, **common, note=about), shared),
            (Measurement("neighbour_agreement", chance, **null, note=expected), None),
        ]

    def _cka(self, own: Gram, within: Tensor, other: Gram) -> Estimate:
        value, *without = (hsic(own, other) / (within * self.within[id(other)]).sqrt()).tolist()
        sizes = np.bincount(self.group, minlength=GROUPS).astype(float).tolist()
        if not all(map(math.isfinite, (value, *without))):
            return Estimate(None, note="the images' mean tokens do not vary")
        interval = jackknife(value, without, sizes, log=False)
        return Estimate(value, *(interval or (None, None)))

    def _row(self, own: Gram, within: Tensor, other: Gram, common: dict[str, Any], said: str = "") -> Measurement:
        found = self._cka(own, within, other)
        return Measurement("cka", **found.fields, note="; ".join(filter(None, [found.note, said])), **common)
