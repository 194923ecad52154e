"""Patch structure: do the patches of one object stay alike, and apart from everything else?

The claim is the paper's (intra-object cohesion and inter-object coupling both rise with depth, coupling
faster); the definitions are ours, see docs/metrics.md. With unit vectors u_i and Σ_k = Σ_{i∈k} u_i, every
mean of pairwise cosines follows from |Σ_k|² and Σ_k·(Σ − Σ_k), so that no token × token matrix is ever
formed: O(N·d) instead of O(N²·d).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 20  # rows normalised and summed together: small enough to be read from memory only once


def membership(coverage: Tensor, threshold: float = 0.5) -> Tensor:
    """Which patch belongs to which object.

    Args:
        coverage: [K, N], share of patch n's area that object k covers.
        threshold: a patch belongs to an object that covers at least this share of it (ours).

    Returns:
        bool [K, N].

    Raises:
        ValueError: coverage is not a matrix of shares in [0, 1].
    """
    if coverage.ndim != 2 or (coverage.numel() and not (coverage.min() >= -1e-6 and coverage.max() <= 1 + 1e-6)):
        raise ValueError(
            f"coverage must be a [K, N] matrix of area shares in [0, 1]; got shape {tuple(coverage.shape)}"
            + (f" with values in [{coverage.min():.3g}, {coverage.max():.3g}]" if coverage.numel() else "")
        )
    return coverage >= threshold


@dataclass(frozen=True)
class Groups:
    """The sums to take over the T tokens of a batch: one for each of B images, one for each of K objects.

    weights: [B + K, T], 1 where the token is in the group (images first); owner: [K], the image of an object.
    """

    weights: Tensor
    owner: Tensor

    @classmethod
    def build(cls, image: Tensor, n_images: int, objects: Tensor | None = None, owner: Tensor | None = None) -> Groups:
        """image: [T], each token's image; objects: bool [K, T]; owner: [K], each object's image."""
        images = torch.nn.functional.one_hot(image.long(), n_images).T.to(torch.float32)
        if objects is None or owner is None:
            objects, owner = image.new_zeros((0, image.shape[0])), image.new_zeros(0)
        return cls(torch.cat([images, objects.to(images)], dim=0), owner.long())

    @property
    def n_images(self) -> int:
        return self.weights.shape[0] - self.owner.shape[0]

    @cached_property
    def sizes(self) -> Tensor:
        """[B + K], tokens in each group."""
        return self.weights.sum(dim=1)

    @cached_property
    def pairs(self) -> Tensor:
        """[B + K], ordered pairs of different tokens inside each group; NaN where there is none."""
        pairs = self.sizes * (self.sizes - 1)
        return torch.where(pairs > 0, pairs, float("nan"))

    @cached_property
    def outside_pairs(self) -> Tensor:
        """[K], pairs of a token inside an object and one outside it; NaN where cohesion or coupling is undefined."""
        size = self.sizes[self.n_images :]
        outside = self.sizes[self.owner] - size
        return torch.where((size >= 2) & (outside >= 1), size * outside, float("nan"))

    @cached_property
    def defined(self) -> Tensor:
        """[B, K], 1 where the object is in the image and has pairs."""
        return torch.nn.functional.one_hot(self.owner, self.n_images).T * (~self.outside_pairs.isnan()).float()

    @cached_property
    def counts(self) -> Tensor:
        """[B, 1], the objects with pairs of each image."""
        return self.defined.sum(dim=1, keepdim=True)

    def keep(self, tokens: Tensor) -> Groups:
        """The same groups with only these tokens in them (tokens: bool [T])."""
        return Groups(self.weights * tokens, self.owner)

    def image_mean(self, values: Tensor) -> Tensor:
        """Mean over the defined objects of each image: [K, V] → [B, V], NaN without objects."""
        return (self.defined @ values.nan_to_num(nan=0.0)) / self.counts  # 0 / 0 is the NaN that is wanted


@dataclass(frozen=True)
class Structure:
    """Mean cosines: homogeneity [B] over the token pairs of an image; cohesion and coupling [K] of its objects.

    NaN where there is no pair. An object is defined when it has two patches inside and one outside, so that
    cohesion, coupling and their difference are always over the same objects.
    """

    homogeneity: Tensor
    cohesion: Tensor
    coupling: Tensor
    norms: Tensor  # [T], of the tokens as compared (centred, without the channels left out)

    @property
    def gap(self) -> Tensor:
        """[K] cohesion − coupling: the headline (ours). Zero means that an object's patches do not stand out."""
        return self.cohesion - self.coupling


def unit_sums(tokens: Tensor, weights: Tensor, centre: Tensor | None = None, channels: Tensor | None = None):
    """Weighted sums of unit vectors: [T, d], [G, T] → ([G, d], norms [T]); a zero token counts as the zero vector.

    centre: [d], taken off first. channels: [d], 0 for the channels to leave out, 1 for the others.
    """
    n_tokens, width = tokens.shape
    sums = tokens.new_zeros((weights.shape[0], width), dtype=torch.float32)
    norms = tokens.new_empty(n_tokens, dtype=torch.float32)
    rows = max(32, CHUNK_BYTES // (4 * width)) if tokens.device.type == "cpu" else n_tokens
    for start in range(0, n_tokens, rows):
        chunk = tokens[start : start + rows].float()
        if centre is not None:
            chunk = chunk - centre
        if channels is not None:
            chunk = chunk * channels
        norm = torch.linalg.vector_norm(chunk, dim=1, out=norms[start : start + rows])
        scale = norm.reciprocal().nan_to_num_(posinf=0.0)  # a zero token stays zero
        sums.addmm_(weights[:, start : start + rows] * scale, chunk)
    return sums, norms


def structure(
    tokens: Tensor, groups: Groups, *, centre: Tensor | None = None, channels: Tensor | None = None
) -> Structure:
    """Homogeneity, cohesion and coupling of a batch, in O(T·d) per group.

    Args:
        tokens: [T, d], the visual tokens of all images of the batch.
        groups: which token is in which image and object.
        centre: [d] or None; the layer's mean token, for the centred variant.
        channels: [d] or None; 0 for channels to leave out.

    Returns:
        float32 tensors, see `Structure`. cohesion_k = mean cosine over the pairs inside object k;
        coupling_k = mean cosine between object k and every other patch of its image.
    """
    sums, norms = unit_sums(tokens, groups.weights, centre, channels)
    b = groups.n_images
    own = groups.weights @ norms.sign()  # Σ|u_i|², the pairs of a token with itself
    squares = (sums * sums).sum(dim=1)
    inside = (squares - own) / groups.pairs
    across = (sums[b:] * sums[groups.owner]).sum(dim=1) - squares[b:]
    undefined = groups.outside_pairs.isnan()
    return Structure(
        homogeneity=inside[:b],
        cohesion=inside[b:].masked_fill(undefined, float("nan")),
        coupling=across / groups.outside_pairs,
        norms=norms,
    )


def patch_structure(tokens: Tensor, members: Tensor, centre: Tensor | None = None) -> Structure:
    """The same for one image: tokens [N, d], members bool [K, N].

    Raises:
        ValueError: members does not have one column per token.
    """
    if members.ndim != 2 or members.shape[1] != tokens.shape[0]:
        raise ValueError(
            f"members must be [K, {tokens.shape[0]}], one column per token; got shape {tuple(members.shape)}"
        )
    image = torch.zeros(tokens.shape[0], dtype=torch.long, device=tokens.device)
    owner = torch.zeros(members.shape[0], dtype=torch.long, device=tokens.device)
    return structure(tokens, Groups.build(image, 1, members, owner), centre=centre)
