"""Patch structure: do the patches of one object stay alike, and apart from everything else?

The claim is the paper's (intra-object cohesion and inter-object coupling both rise with depth, coupling
faster); the definitions are ours, see docs/metrics.md. With unit vectors u_i and Σ_k = Σ_{i∈k} u_i, every
mean of pairwise cosines follows from |Σ_k|² and Σ_k·(Σ − Σ_k), so that no token × token matrix is ever
formed: O(N·d) instead of O(N²·d).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from keepsight.diagnosis.metrics.bleeding import Neighbourhood

CHUNK_BYTES = 3 << 18  # rows normalised and summed together: few enough to stay in a core's cache between the two
TINY = torch.finfo(torch.float32).tiny  # what a zero token is divided by, to stay the zero vector


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
    """Which of the T tokens of a batch are in which of its groups: B images, then K objects.

    parts: [P, T], 1 where the token is in the part: the tokens that are in the same groups, in the order of their
    first; members: [B + K, P], 1 where the part is in the group; owner: [K], the image of an object; counted: bool [B],
    the images whose neighbours `near` is of. Sums over the groups are `members` times those over the parts, and a few
    neighbouring tokens are in a few parts.
    """

    parts: Tensor
    members: Tensor
    owner: Tensor
    counted: Tensor

    @classmethod
    def build(
        cls,
        image: Tensor,
        n_images: int,
        objects: Tensor | None = None,
        owner: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> Groups:
        """image: [T], each token's image, rising; objects: bool [K, T]; owner: [K], each object's image; counted: [B].

        Raises:
            ValueError: the tokens are not in the order of their images.
        """
        image = image.long()
        if bool((image.diff() < 0).any()):
            raise ValueError("tokens must come image by image, in rising order; got image numbers that fall")
        groups = torch.nn.functional.one_hot(image, n_images).T.to(torch.float32)
        if objects is None or owner is None:
            objects, owner = image.new_zeros((0, image.shape[0])), image.new_zeros(0)
        if counted is None:
            counted = torch.ones(n_images, dtype=torch.bool, device=image.device)
        groups = torch.cat([groups, objects.to(groups)])
        return cls(*_parts(groups), owner.long(), counted)

    @property
    def n_images(self) -> int:
        return self.members.shape[0] - self.owner.shape[0]

    @cached_property
    def weights(self) -> Tensor:
        """[B + K, T], 1 where the token is in the group."""
        return self.members @ self.parts

    @cached_property
    def sizes(self) -> Tensor:
        """[B + K], tokens in each group."""
        return self.weights.sum(dim=1)

    @cached_property
    def pairs(self) -> Tensor:
        """[B + 2K], pairs that a mean is over: inside each image, inside each object, between object and rest.

        NaN where there is none; for objects, unless both exist.
        """
        images, objects = self.sizes[: self.n_images], self.sizes[self.n_images :]
        rest = images[self.owner] - objects
        defined = (objects >= 2) & (rest >= 1)
        inside, outside = objects * (objects - 1), objects * rest
        return torch.cat(
            [
                torch.where(images >= 2, images * (images - 1), float("nan")),
                torch.where(defined, inside, float("nan")),
                torch.where(defined, outside, float("nan")),
            ]
        )

    @cached_property
    def mean_weights(self) -> Tensor:
        """[B, T], what averages over the tokens of each image; NaN for an image without tokens."""
        return self.weights[: self.n_images] / self.sizes[: self.n_images, None]

    @cached_property
    def products(self) -> Tensor:
        """[B + 2K], where the products that `pairs` belongs to lie in a flat [B + K, B + K] matrix of all products."""
        every = torch.arange(self.members.shape[0], device=self.owner.device)
        return torch.cat([every, every[self.n_images :]]) * len(every) + torch.cat([every, self.owner])

    @cached_property
    def defined(self) -> Tensor:
        """[B, K], 1 where the object is in the image and has pairs."""
        exists = ~self.pairs[self.n_images + len(self.owner) :].isnan()
        return torch.nn.functional.one_hot(self.owner, self.n_images).T * exists.float()

    @cached_property
    def counts(self) -> Tensor:
        """[B, 1], the objects with pairs of each image."""
        return self.defined.sum(dim=1, keepdim=True)

    @cached_property
    def near(self) -> Neighbourhood:
        """What each patch of each object is compared with."""
        inside = self.weights > 0
        return Neighbourhood.build(inside[: self.n_images], inside[self.n_images :], self.owner, self.counted)

    def chunks(self, rows: int) -> list[tuple[slice, Tensor]]:
        """For `rows` tokens at a time: the rows of `parts` from the first to the last in use there, and that block."""
        if rows not in self._chunks:
            n_parts, n_tokens = self.parts.shape
            number = torch.arange(n_parts, device=self.parts.device)[:, None]
            first = torch.where(self.parts > 0, number, n_parts).amin(dim=0).tolist()
            last = torch.where(self.parts > 0, number, -1).amax(dim=0).tolist()
            self._chunks[rows] = found = []
            for start in range(0, n_tokens, rows):
                stop = start + rows
                concerned = slice(min(first[start:stop]), max(last[start:stop]) + 1)
                found.append((concerned, self.parts[concerned, start:stop]))
        return self._chunks[rows]

    @cached_property
    def _chunks(self) -> dict[int, list[tuple[slice, Tensor]]]:
        return {}

    def keep(self, tokens: Tensor) -> Groups:
        """The same groups with only these tokens in them (tokens: bool [T])."""
        return Groups(self.parts * tokens, self.members, self.owner, self.counted)

    def token_mean(self, values: Tensor) -> Tensor:
        """Mean over the tokens of each image: [T] or [T, d] → [B] or [B, d], NaN without tokens."""
        return self.mean_weights @ values

    def image_mean(self, values: Tensor) -> Tensor:
        """Mean over the defined objects of each image: [K, V] → [B, V], NaN without objects."""
        return (self.defined @ values.nan_to_num(nan=0.0)) / self.counts  # 0 / 0 is the NaN that is wanted

    def counted_mean(self, values: Tensor) -> Tensor:
        """`image_mean`, but NaN for images that are not counted."""
        return torch.where(self.counted[:, None], self.image_mean(values), float("nan"))


def _parts(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Groups [G, T] → parts [P, T] and their groups [G, P]; the groups themselves where those are far fewer."""
    n_groups, n_tokens = groups.shape
    # Tokens of the same groups have the same sum of the groups' random numbers, and others almost surely have not.
    number = torch.randint(1 << 62, (n_groups, 1), generator=torch.Generator().manual_seed(0)).to(groups.device)
    _, part = torch.unique((groups.long() * number).sum(dim=0), return_inverse=True)
    n_parts = int(part.max()) + 1 if n_tokens else 0
    if 0 < n_parts <= 2 * n_groups:
        token = torch.arange(n_tokens, device=groups.device)
        first = torch.full_like(token[:n_parts], n_tokens).scatter_reduce(0, part, token, "amin")
        first, order = first.sort()
        parts, members = (part == order[:, None]).to(groups), groups[:, first]
        if torch.equal(members @ parts, groups):
            return parts, members
    return groups, torch.eye(n_groups, device=groups.device)


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


def unit_sums(
    tokens: Tensor, groups: Groups, centre: Tensor | None = None, channels: Tensor | None = None, floor: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Sums of unit vectors over each part of the groups: [T, d] → ([P, d], norms [T]).

    centre: [d], taken off first. channels: [d], 0 for the channels to leave out, 1 for the others. floor: the least
    norm to divide by; a zero token makes the sums NaN without one, and counts as the zero vector with one.
    """
    n_tokens, width = tokens.shape
    sums = tokens.new_zeros((groups.parts.shape[0], width), dtype=torch.float32)
    norms = tokens.new_empty(n_tokens, dtype=torch.float32)
    in_chunks = tokens.device.type == "cpu"
    rows = max(32, CHUNK_BYTES // (4 * width)) if in_chunks else n_tokens
    # Beside two passes over a chunk that streams through the cache each further operation costs as much as a tenth
    # of them, so the loop holds only what it must; what gradients would need at each is a tenth of the whole.
    with torch.inference_mode(in_chunks):
        for chunk, norm, (concerned, weights) in zip(
            tokens.split(rows), norms.split(rows), groups.chunks(rows), strict=True
        ):
            if chunk.dtype is not torch.float32:
                chunk = chunk.float()
            if centre is not None:
                chunk = chunk - centre
            if channels is not None:
                chunk = chunk * channels
            torch.linalg.vector_norm(chunk, dim=1, out=norm)
            if floor:
                norm.clamp_min_(floor)
            sums[concerned].addmm_(weights / norm, chunk)
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
    sums, norms = unit_sums(tokens, groups, centre, channels)
    products, own = sums @ sums.T, groups.sizes
    if math.isnan(float(products.sum())) and not norms.all():
        sums, _ = unit_sums(tokens, groups, centre, channels, floor=TINY)
        products, own = sums @ sums.T, groups.weights @ (norms > 0).float()
    b, k = groups.n_images, groups.owner.shape[0]
    products = groups.members @ products @ groups.members.T
    values = products.take(groups.products)  # Σ·Σ of images, Σ_k·Σ_k and Σ·Σ_k of objects
    values[b + k :] -= values[b : b + k]
    values[: b + k] -= own  # Σ|u_i|²
    values /= groups.pairs
    return Structure(values[:b], values[b : b + k], values[b + k :], norms)


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
