"""Bleeding: how many of a patch's nearest neighbours belong to something else? Ours.

A patch of an object of n patches has n − 1 others of its kind. Of its n − 1 most similar patches in the image, the
share that lies outside the object, less what chance would give, says how far the object has run into its surroundings.
Unlike the gap, a difference of means, it counts neighbours: it does not move when all cosines rise together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TIE = 1e-6  # cosines nearer than this are one and the same: float32 products of equal vectors differ in the last digits
CHUNK = 1 << 22  # cosines at a time


@dataclass(frozen=True)
class Neighbourhood:
    """What each patch of each object is compared with, for a batch of T tokens, B images and K objects.

    A row is a pair of an object and one of its patches, M in all, image by image; N is the largest image's tokens.
    token, owner, wanted: [M], the patch, its object, and n − 1; outside, others: bool [M, N], of the image's tokens
    those outside the object, and all but the patch itself; images: of each, the token numbers [n_i], the patches of its
    rows among them, and the rows; n_objects: K.
    """

    token: Tensor
    owner: Tensor
    wanted: Tensor
    outside: Tensor
    others: Tensor
    images: list[tuple[Tensor, Tensor, slice]]
    n_objects: int

    @classmethod
    def build(cls, in_image: Tensor, in_object: Tensor, image_of: Tensor, counted: Tensor) -> Neighbourhood:
        """in_image: bool [B, T]; in_object: bool [K, T], within their images; image_of: [K]; counted: bool [B].

        Objects with fewer than two patches, with none outside, or of images that are not counted, have no rows.
        """
        inside, total = in_object.sum(dim=1), in_image.sum(dim=1)
        usable = (inside >= 2) & (total[image_of] > inside) & counted[image_of]
        longest = int(total.max()) if len(total) else 0
        tokens, owners, masks, images, start = [], [], [], [], 0
        for image in range(len(in_image)):
            mine = (usable & (image_of == image)).nonzero()[:, 0]
            if not len(mine):
                continue
            columns = in_image[image].nonzero()[:, 0]
            members = in_object[mine][:, columns]
            which, where = members.nonzero(as_tuple=True)
            outside = columns.new_zeros(2, len(which), longest, dtype=torch.bool)
            outside[0, :, : len(columns)] = ~members[which]
            outside[1, :, : len(columns)] = True
            outside[1, torch.arange(len(which), device=where.device), where] = False
            tokens.append(columns[where])
            owners.append(mine[which])
            masks.append(outside)
            images.append((columns, where, slice(start, start + len(which))))
            start += len(which)
        if not tokens:
            none = image_of.new_zeros(0)
            empty = torch.zeros(0, 0, dtype=torch.bool, device=image_of.device)
            return cls(none, none, none, empty, empty, [], len(in_object))
        owner, both = torch.cat(owners), torch.cat(masks, dim=1)
        return cls(torch.cat(tokens), owner, inside[owner] - 1, both[0], both[1], images, len(in_object))


def bleeding(
    tokens: Tensor, near: Neighbourhood, centre: Tensor | None = None, channels: Tensor | None = None
) -> Tensor:
    """[K]: of each object's patches, the mean share of nearest neighbours that lie outside, less chance; NaN without.

    0: neighbours as by chance; −(N − n)/(N − 1): only patches of the object itself; above 0: rather others.

    Args:
        tokens: [T, d]. near: what is compared. centre: [d], taken off first. channels: [d], 0 for those to leave out.
    """
    result = tokens.new_full((near.n_objects,), float("nan"), dtype=torch.float32)
    if not len(near.token):
        return result
    cosine = tokens.new_full(near.others.shape, float("-inf"), dtype=torch.float32)
    for columns, where, rows in near.images:
        x = tokens[columns].float()
        if centre is not None:
            x = x - centre
        unit = torch.nn.functional.normalize(x if channels is None else x * channels, dim=1, eps=1e-30)
        few = 2 * len(where) < len(unit)  # else all patches are compared, and rows of the products taken
        cosine[rows, : len(unit)] = unit[where] @ unit.T if few else (unit @ unit.T)[where]
    step = max(1, CHUNK // near.others.shape[1])
    parts = zip(*(table.split(step) for table in (cosine, near.others, near.outside, near.wanted)), strict=True)
    shares = torch.cat([_outside_share(*part) for part in parts])
    chance = near.outside.sum(dim=1) / near.others.sum(dim=1)
    count = torch.bincount(near.owner, minlength=near.n_objects)
    total = torch.zeros_like(result).index_add_(0, near.owner, shares - chance)
    return torch.where(count > 0, total / count, result)


def _outside_share(cosine: Tensor, others: Tensor, outside: Tensor, wanted: Tensor) -> Tensor:
    """[M]: share outside among the `wanted` most similar others; those tied for the last places share them."""
    cosine = cosine.masked_fill(~others, float("-inf"))
    least = cosine.topk(int(wanted.max()), dim=1).values.gather(1, wanted[:, None] - 1)
    above, tied = cosine > least + TIE, (cosine - least).abs() <= TIE
    left = wanted - above.sum(dim=1)
    certain, shared = (above & outside).sum(dim=1), (tied & outside).sum(dim=1) / tied.sum(dim=1)
    return (certain + left * shared) / wanted
