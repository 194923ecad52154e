"""Anchors without their information: what a head can do by itself. Ours."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from keepsight.pre.config import Control
from keepsight.vlm.grids import ImageTokens

Grids = tuple[tuple[tuple[int, int], ...], ...]


class ControlAnchor:
    """Replaces the anchor of a forward.

    Args:
        kind: see `PReConfig.control`.
        seed: of the random kinds; what they draw depends on it, on the optimizer step and on the forward within the
            step, and on nothing else, so that a resumed run draws the same.
    """

    def __init__(self, kind: Control, seed: int) -> None:
        self.kind = kind
        self.seed = seed
        self.last: tuple[Tensor, Grids] | None = None  # the last picture of all processes
        self._vectors: dict[tuple[int, int, int], Tensor] = {}

    def __call__(self, anchor: Tensor, tokens: ImageTokens, step: int, forward: int) -> Tensor:
        """``[T, d]`` → ``[T, d]``. With several processes, "other_image" must be called by all of them."""
        if self.kind == "other_image":
            return self._other_image(anchor, tokens)
        if not tokens.n_images:
            return anchor
        if self.kind == "shuffled_patches":
            generator = torch.Generator().manual_seed(hash((self.seed, step, forward)) % 2**63)
            parts = anchor.split(tokens.counts().tolist())
            return torch.cat([part[torch.randperm(len(part), generator=generator).to(part.device)] for part in parts])
        places = zip(tokens.tile.tolist(), tokens.row.tolist(), tokens.column.tolist(), strict=True)
        return torch.stack([self._vector(place, anchor.shape[1]) for place in places]).to(anchor)

    def _vector(self, place: tuple[int, int, int], width: int) -> Tensor:
        if place not in self._vectors:
            generator = torch.Generator().manual_seed(hash((self.seed, *place)) % 2**63)
            self._vectors[place] = torch.randn(width, generator=generator)
        return self._vectors[place]

    def _other_image(self, anchor: Tensor, tokens: ImageTokens) -> Tensor:
        """Of the picture before, in the order of all processes' pictures and from forward to forward."""
        pool, grids, first = _gather(anchor, tokens.grids)
        if not grids:
            return anchor
        if self.last is not None:
            pool, grids, first = torch.cat([self.last[0].to(pool), pool]), self.last[1] + grids, first + 1
        starts = torch.tensor([0, *(_size(picture) for picture in grids)]).cumsum(0).tolist()
        self.last = pool[starts[-2] :].detach().clone(), grids[-1:]
        found, own = [], tokens.image.cpu()
        for image in range(tokens.n_images):
            number = first + image
            other = max(0, number - 1)
            chosen = own == image
            tile, row, column = (part.cpu()[chosen] for part in (tokens.tile, tokens.row, tokens.column))
            index = starts[other] + _same_place(tile, row, column, tokens.grids[image], grids[other])
            if not number:  # the very first picture has none before it: its own patches, back to front
                index = index.flip(0)
            found.append(pool[index.to(pool.device)])
        return torch.cat(found) if found else anchor


def _size(picture: tuple[tuple[int, int], ...]) -> int:
    return sum(rows * columns for rows, columns in picture)


def _same_place(
    tile: Tensor, row: Tensor, column: Tensor, grid: tuple[tuple[int, int], ...], other: tuple[tuple[int, int], ...]
) -> Tensor:
    """Index within the other picture of the token at the same relative place."""
    own, theirs = torch.tensor(grid), torch.tensor(other)
    starts = torch.cat([theirs.new_zeros(1), theirs.prod(dim=1).cumsum(0)])
    there = tile.clamp(max=len(other) - 1)
    rows = row * theirs[there, 0] // own[tile, 0]
    columns = column * theirs[there, 1] // own[tile, 1]
    return starts[there] + rows * theirs[there, 1] + columns


def _gather(anchor: Tensor, grids: Grids) -> tuple[Tensor, Grids, int]:
    """The anchors of all processes, their pictures' grids, and the number of this process's first picture."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return anchor, grids, 0
    everyone: list[Grids] = [()] * dist.get_world_size()
    dist.all_gather_object(everyone, grids)
    sizes = [sum(_size(picture) for picture in own) for own in everyone]
    if not any(sizes):
        return anchor, grids, 0
    # One type for all: a process without pictures does not know that of the others' anchors.
    padded = anchor.new_zeros(max(sizes), anchor.shape[1], dtype=torch.float32)
    padded[: len(anchor)] = anchor
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    pool = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    first = sum(len(own) for own in everyone[: dist.get_rank()])
    return pool, tuple(picture for own in everyone for picture in own), first
