"""From object masks to visual tokens, by the processor's own resize, crop, padding and tiling."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from keepsight.vlm.features import block_order
from keepsight.vlm.grids import merge_side, resampled
from keepsight.vlm.newlines import NEWLINE_TILES, packed, tile_counts
from keepsight.vlm.view import Vlm

BACKGROUND, IGNORE = 0, 255


def patch_coverage(processor: Any, vlm: Vlm, mask: np.ndarray, prompt: str) -> tuple[list[int], Tensor]:
    """Share of every visual token's pixels that each object of a picture covers.

    Whatever a processor does to a picture (resize, crop, padding, tiles), it does to a picture *of the mask*: three
    objects at a time are painted white into the colour channels, processed, and compared with an all-black and an
    all-white picture, which removes rescaling and normalisation and makes padding count as no object. Nothing about the
    geometry is known per family, except which pixels a token stands for. Ours.

    Args:
        processor: the model's processor.
        vlm: the model.
        mask: ``[H, W]`` uint8, 0 background, 255 ignored, other values objects; of the picture's size.
        prompt: a text with one image placeholder, as the picture itself is processed with.

    Returns:
        The object ids (sorted), and the coverage ``[K, N]`` in 0…1, N tokens in the order of `Vlm.image_tokens`
        (all tiles of the picture, thumbnail included).

    Raises:
        ValueError: for a mask that is not two-dimensional uint8.
    """
    if mask.ndim != 2 or mask.dtype != np.uint8:
        raise ValueError(
            f"a mask must be a [H, W] array of uint8 (0 background, 255 ignored), got shape {mask.shape}, {mask.dtype}."
        )
    objects = [int(value) for value in np.unique(mask) if value not in (BACKGROUND, IGNORE)]

    def painted(picture: np.ndarray) -> Tensor:
        return _painted(processor, vlm, picture, prompt)

    black = painted(np.zeros((*mask.shape, 3), np.uint8))  # [N, 3]
    span = painted(np.full((*mask.shape, 3), 255, np.uint8)) - black
    scale = span.amax(dim=0).clamp(min=1e-12)  # of a token wholly inside the picture
    rows = []
    for first in range(0, len(objects), 3):
        picture = np.zeros((*mask.shape, 3), np.uint8)
        for channel, value in enumerate(objects[first : first + 3]):
            picture[..., channel] = np.where(mask == value, 255, 0)
        share = (painted(picture) - black) / scale
        rows.append(share.T[: len(objects) - first])
    coverage = torch.cat(rows) if rows else black.new_zeros(0, len(black))
    return objects, coverage.clamp(0.0, 1.0)


def patch_centres(processor: Any, vlm: Vlm, size: tuple[int, int], prompt: str) -> Tensor:
    """Where in the picture each visual token lies: ``[N, 2]``, (x, y) of its centre, shares of width and height.

    By the same means as `patch_coverage`: the processor gets a picture whose first colour rises from left to right and
    whose second from top to bottom. Of a token that is partly padding, the centre of its part inside; NaN for one that
    is padding alone.

    Args:
        size: width and height of the picture.
    """
    width, height = size
    ramps = np.zeros((height, width, 3), np.uint8)
    ramps[..., 0] = np.rint(255 * (np.arange(width) + 0.5) / width)[None, :]
    ramps[..., 1] = np.rint(255 * (np.arange(height) + 0.5) / height)[:, None]
    black, white = (np.full((height, width, 3), value, np.uint8) for value in (0, 255))
    painted = [_painted(processor, vlm, picture, prompt) for picture in (black, white, ramps)]
    span, rise = painted[1] - painted[0], painted[2] - painted[0]
    inside = span.abs() > 1e-3 * span.abs().amax(dim=0)
    return torch.where(inside, rise / span, float("nan"))[:, :2]


def _painted(processor: Any, vlm: Vlm, picture: np.ndarray, prompt: str) -> Tensor:
    """Mean processed pixel of every token, ``[N, 3]``."""
    # The whole processor, because some tell their image processor what it would not do by itself (InternVL: to tile).
    # Bilinear, because the overshoot of bicubic and Lanczos kernels is clipped at black and white, which biases areas.
    batch = processor(
        images=[[Image.fromarray(picture)]],
        text=[prompt],
        return_tensors="pt",
        images_kwargs={"resample": Image.Resampling.BILINEAR},
    )
    return token_pixels(vlm, batch)


def token_pixels(vlm: Vlm, batch: dict[str, Any]) -> Tensor:
    """Mean pixel of the area that each visual token stands for, ``[N, 3]``, of one picture's processed batch.

    Raises:
        ValueError: for a family whose visual tokens stand for no area.
    """
    config = vlm.config
    if resampled(config):
        raise ValueError(
            f"model family {vlm.family!r}: its visual tokens come out of a resampler and stand for no part of the "
            "picture, so neither masks nor an external anchor have tokens to fall on. Leave masks out, and use the "
            "anchor 'pre_llm'."
        )
    pixels = batch["pixel_values"].float()
    grid = batch.get("image_grid_thw")
    if grid is not None:
        # [patches, 3 · frames · patch²], the patches of one token consecutive; Kimi's row by row.
        side = merge_side(config)
        if hasattr(config.vision_config, "merge_kernel_size"):
            pixels = pixels[block_order([(rows // side, columns // side) for _, rows, columns in grid.tolist()], side)]
        return pixels.reshape(len(pixels) // side**2, side**2, 3, -1).mean(dim=(1, 3))
    if vlm.family in NEWLINE_TILES:
        tiles = [own[:count] for own, count in zip(pixels, tile_counts(config, batch), strict=True)]
        return torch.cat(
            packed(vlm.core, _patch_means(torch.cat(tiles), _first(config.vision_config.patch_size)), batch)
        )
    patch = _first(config.vision_config.patch_size) * _merged_patches(config)
    return _patch_means(pixels.reshape(-1, *pixels.shape[-3:]), patch).flatten(0, 1)


def _patch_means(tiles: Tensor, patch: int) -> Tensor:
    """``[tiles, 3, H, W]`` → ``[tiles, patches, 3]``; what is left over at the edges belongs to no patch."""
    return F.avg_pool2d(tiles, patch).flatten(2).transpose(1, 2)


def _merged_patches(config: Any) -> int:
    """How many patches a side one token of a fixed-grid family merges."""
    vision = config.vision_config
    if hasattr(config, "mm_tokens_per_image"):  # Gemma3: average pooling to a fixed number of tokens
        return vision.image_size // vision.patch_size // int(config.mm_tokens_per_image**0.5)
    if hasattr(config, "image_seq_length") and config.model_type == "got_ocr2":  # strided convolutions
        return _first(vision.image_size) // _first(vision.patch_size) // int(config.image_seq_length**0.5)
    # Pixel shuffle: InternVL, Llama 4, Idefics3 and SmolVLM, Aya Vision, Ovis2.
    for owner, name in ((config, "downsample_ratio"), (vision, "pixel_shuffle_ratio")):
        if hasattr(owner, name):
            return round(1 / getattr(owner, name))
    for owner, name in ((config, "scale_factor"), (config, "downsample_factor"), (vision, "hidden_stride")):
        if hasattr(owner, name):
            return int(getattr(owner, name))
    return int(getattr(config, "spatial_merge_size", 1))


def _first(size: Any) -> int:
    return int(size[0]) if isinstance(size, (list, tuple)) else int(size)


def token_centres(processor: Any, vlm: Vlm, width: int, height: int, prompt: str) -> Tensor:
    """Where each visual token of a picture of this size looks: ``[N, 2]``, x and y from 0 to 1 across the picture.

    As `patch_coverage`, but with a picture whose colours are the coordinates. Of a token that is partly padding, the
    centre of its part inside the picture; of one that is nothing but padding, the picture's centre. Ours.
    """

    def painted(picture: np.ndarray) -> Tensor:
        return _painted(processor, vlm, picture, prompt)

    x = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width))
    y = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], (height, width))
    black = painted(np.zeros((height, width, 3), np.uint8))
    span = painted(np.full((height, width, 3), 255, np.uint8)) - black
    ramps = np.stack([np.round(255 * x), np.round(255 * y), np.zeros_like(x)], axis=-1).astype(np.uint8)
    moved = painted(ramps) - black
    inside = span[:, :2] > 0.01 * span.amax()
    centres = moved[:, :2] / span[:, :2].clamp(min=1e-12)
    return torch.where(inside, centres, 0.5).clamp(0.0, 1.0)
