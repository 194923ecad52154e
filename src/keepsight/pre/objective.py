"""The predictive loss, as pure tensor functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from keepsight.pre.config import Distance, Granularity
from keepsight.vlm.grids import ImageTokens


def token_cosines(prediction: Tensor, anchor: Tensor) -> Tensor:
    """``cos(f_pred(h_i), anchor_i)`` of every visual token, in float32.

    Args:
        prediction: ``[T, d]``.
        anchor: ``[T, d]``; detached here, whatever comes in (the paper's stop-gradient).

    Returns:
        ``[T]``, the cosine along the feature dimension.
    """
    return F.cosine_similarity(prediction.float(), anchor.detach().float(), dim=-1)


def image_means(values: Tensor, image: Tensor, n_images: int) -> Tensor:
    """Mean over the tokens of each picture: ``[T, ...]`` values, ``[T]`` picture numbers → ``[n_images, ...]``.

    Raises:
        ValueError: when a picture has no token, because its mean does not exist.
    """
    counts = torch.bincount(image, minlength=n_images)
    if bool((counts == 0).any()):
        empty = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(f"pictures {empty} of {n_images} have no visual token; leave them out of the batch.")
    sums = values.new_zeros((n_images, *values.shape[1:])).index_add(0, image, values)
    return sums / counts.view(-1, *[1] * (values.dim() - 1))


def predictive_loss_sum(
    prediction: Tensor,
    anchor: Tensor,
    tokens: ImageTokens,
    *,
    granularity: Granularity = "patch",
    distance: Distance = "cosine",
    temperature: float = 0.1,
) -> Tensor:
    """Sum over pictures of the picture's loss; by default the paper's L_PRe before its batch mean,
    ``-(1/N_p) Σ_i cos(f_pred(h_i), sg(anchor_i))``.

    A sum, because the mean over the pictures of an optimizer step can only be taken by whoever knows all its
    micro-batches and processes. The other granularities and distances are ours: see `PReConfig`.

    Args:
        prediction: ``[T, d]``.
        anchor: ``[T, d]``; detached here.
        tokens: which picture each of the T tokens belongs to.
    """
    prediction, anchor = prediction.float(), anchor.detach().float()
    image, n_images = tokens.image, tokens.n_images
    if granularity == "global":
        losses = _distances(image_means(prediction, image, n_images), image_means(anchor, image, n_images), distance)
        return losses.sum()
    if granularity == "patch" and distance != "infonce":
        return image_means(_distances(prediction, anchor, distance), image, n_images).sum()
    total = prediction.new_zeros(())
    counts = tokens.counts().tolist()
    for mine, target in zip(prediction.split(counts), anchor.split(counts), strict=True):
        if granularity == "relational":
            mine, target = _cosines(mine, mine), _cosines(target, target)
            if distance == "mse":  # of cosines, which need no further scale
                total = total + (mine - target).square().mean()
                continue
        if distance == "infonce":
            logits = _cosines(mine, target) / temperature
            total = total + F.cross_entropy(logits, torch.arange(len(mine), device=mine.device))
        else:
            total = total + _distances(mine, target, distance).mean()
    return total


def _distances(prediction: Tensor, anchor: Tensor, distance: Distance) -> Tensor:
    """``[n, d]`` twice → ``[n]``."""
    if distance == "cosine":
        return -token_cosines(prediction, anchor)
    # Standardised over the channels, so that the loss does not hang on the anchor's scale.
    return (prediction - F.layer_norm(anchor, anchor.shape[-1:])).square().mean(dim=-1)


def _cosines(one: Tensor, other: Tensor) -> Tensor:
    """Of every vector with every other: ``[N, d]`` and ``[M, d]`` → ``[N, M]``.

    In float32 under autocast too, whose bfloat16 knows no cosines between 0.996 and 1.
    """
    with torch.autocast(one.device.type, enabled=False):
        return F.normalize(one, dim=-1) @ F.normalize(other, dim=-1).T


def other_image_index(tokens: ImageTokens) -> Tensor:
    """For every token, the one at the same tile, row and column of the next picture (cyclic), or -1 without one.

    Pairing predictions with these anchors tells how much of a cosine any picture would have earned. ``[T]`` long. Ours.
    """
    n_images = tokens.n_images
    if n_images < 2:
        return torch.full_like(tokens.image, -1)
    rows, columns = int(tokens.row.max()) + 1, int(tokens.column.max()) + 1
    place = (tokens.tile * rows + tokens.row) * columns + tokens.column  # [T]
    table = torch.full((n_images, int(place.max()) + 1), -1, dtype=torch.long, device=place.device)
    table[tokens.image, place] = torch.arange(len(place), device=place.device)
    return table[(tokens.image + 1) % n_images, place]
