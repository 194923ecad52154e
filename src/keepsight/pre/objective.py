"""The predictive loss, as pure tensor functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
    """Mean over the tokens of each picture: ``[T]`` values, ``[T]`` picture numbers → ``[n_images]``.

    Raises:
        ValueError: when a picture has no token, because its mean does not exist.
    """
    counts = torch.bincount(image, minlength=n_images)
    if bool((counts == 0).any()):
        empty = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(f"pictures {empty} of {n_images} have no visual token; leave them out of the batch.")
    return values.new_zeros(n_images).index_add(0, image, values) / counts


def predictive_loss_sum(prediction: Tensor, anchor: Tensor, tokens: ImageTokens) -> Tensor:
    """Sum over pictures of ``-(1/N_p) Σ_i cos(f_pred(h_i), sg(anchor_i))`` (the paper's L_PRe, before its batch mean).

    A sum, because the mean over the pictures of an optimizer step can only be taken by whoever knows all its
    micro-batches and processes.

    Args:
        prediction: ``[T, d]``.
        anchor: ``[T, d]``.
        tokens: which picture each of the T tokens belongs to.
    """
    return -image_means(token_cosines(prediction, anchor), tokens.image, tokens.n_images).sum()


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
