"""LLaVA-NeXT and LLaVA-OneVision: a picture as a whole, then as a mosaic of tiles whose rows end in a learned newline.

The mosaic is cut back to the picture's own shape (its padding is no token) and, in LLaVA-OneVision, shrunk if it is
large. The rule is the model's: `pack_image_features` is given features of our own and tells where each of them goes.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

NEWLINE_TILES = frozenset({"llava_next", "llava_next_video", "llava_onevision"})


def tile_counts(config: Any, batch: dict[str, Any]) -> list[int]:
    """Tiles of each picture, the whole included.

    Raises:
        ValueError: when the batch does not say how large the pictures were.
    """
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    sizes = batch.get("image_sizes")
    if sizes is None:
        raise ValueError(
            f"model family {config.model_type!r}: the batch holds image tokens but no 'image_sizes', by which their "
            "places are found: pass the processor's whole output to the model."
        )
    together = batch.get("batch_num_images")  # LLaVA-OneVision: several pictures in one sample are not tiled
    tiled = [True] * len(sizes) if together is None else [int(n) == 1 for n in together for _ in range(int(n))]
    side = config.vision_config.image_size
    return [
        image_size_to_num_patches(size, config.image_grid_pinpoints, side) if tile else 1
        for size, tile in zip(torch.as_tensor(sizes).tolist(), tiled, strict=True)
    ]


def packed(core: Any, features: Tensor, batch: dict[str, Any], newline: Tensor | None = None) -> list[Tensor]:
    """Features of tiles in the order of the visual tokens, by the model's own rule.

    Args:
        core: the module with `pack_image_features`.
        features: ``[tiles, patches, d]``, the tiles of all pictures without padding tiles.
        newline: ``[d]``, what to put at newline tokens; None = leave them out.

    Returns:
        ``[tokens, d]`` of each picture.
    """
    accepted = inspect.signature(core.pack_image_features).parameters
    settings = {
        name: batch[name] if batch.get(name) is not None else getattr(core.config, name)
        for name in ("vision_feature_select_strategy", "vision_aspect_ratio")
        if name in accepted
    }
    tiles = features.split(tile_counts(core.config, batch))
    return core.pack_image_features(list(tiles), batch["image_sizes"], image_newline=newline, **settings)[0]


def newline_tokens(core: Any, batch: dict[str, Any]) -> list[Tensor]:
    """Of each picture, which of its placeholder tokens are newlines, ``[tokens]`` bool."""
    side = core.config.vision_config.image_size // core.config.vision_config.patch_size
    patches = torch.zeros(sum(tile_counts(core.config, batch)), side**2, 1)
    return [picture[:, 0] < 0 for picture in packed(core, patches, batch, newline=torch.tensor([-1.0]))]


def newline_grids(core: Any, flags: list[Tensor]) -> list[tuple[tuple[int, int], ...]]:
    """Of each picture, the grid of the whole and, where there are tiles, of their mosaic without its padding."""
    side = core.config.vision_config.image_size // core.config.vision_config.patch_size
    grids: list[tuple[tuple[int, int], ...]] = []
    for newline in flags:
        in_mosaic, rows = len(newline) - side**2, int(newline.sum())
        if in_mosaic <= 1:  # the whole, and one newline after it
            grids.append(((side, side),))
        else:
            grids.append(((side, side), (rows, in_mosaic // rows - 1)))
    return grids
