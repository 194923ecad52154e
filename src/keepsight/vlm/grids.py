"""From a processor's batch to the image, tile, row and column of every visual token.

There is no uniform way to ask a transformers model where a visual token sits in its picture; each rule here reads it
from what the processor hands over (pixel tensors, grids) and from the runs of placeholder tokens, never from a
hard-coded count, and raises when the two do not fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor

# Families whose image tokens attend to each other in both directions (or to the whole prompt).
BIDIRECTIONAL_IMAGES = frozenset({"gemma3", "paligemma"})
# Tiles of one picture interleaved with learned newline tokens: their map is irregular and not covered yet.
_NEWLINE_TILES = frozenset({"llava_next", "llava_onevision", "llava_next_video"})


@dataclass(frozen=True)
class ImageTokens:
    """The T visual tokens of a batch, ordered by batch row, then position. All tensors are ``[T]`` on one device.

    Attributes:
        batch_row: row of the batch.
        position: position in the sequence.
        image: number of the picture, 0 … n_images-1 in order over the batch.
        tile: number of the tile within its picture (0 where pictures are not tiled).
        thumbnail: whether the tile is the downscaled whole of a picture that has other tiles as well.
        row, column: place within the tile's grid.
        grids: per picture, the (rows, columns) of each of its tiles.
    """

    batch_row: Tensor
    position: Tensor
    image: Tensor
    tile: Tensor
    thumbnail: Tensor
    row: Tensor
    column: Tensor
    grids: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def n_images(self) -> int:
        return len(self.grids)

    def counts(self) -> Tensor:
        """Visual tokens of each picture, ``[n_images]``."""
        return torch.bincount(self.image, minlength=self.n_images)


@dataclass(frozen=True)
class _Run:
    """A contiguous stretch of placeholder tokens."""

    batch_row: int
    start: int
    length: int


# A picture is a list of tiles, a tile its (rows, columns); `thumbnail` is the tile that shows the whole.
@dataclass(frozen=True)
class _Picture:
    grids: tuple[tuple[int, int], ...]
    thumbnail: int | None = None


def image_tokens(config: Any, mask: Tensor, batch: dict[str, Any]) -> ImageTokens:
    """Locate every visual token of a batch.

    Args:
        config: the model's configuration.
        mask: ``[B, S]`` bool, the placeholder positions.
        batch: the processor's output (``pixel_values``, ``image_grid_thw``, …).

    Raises:
        ValueError: when placeholders and pixels do not fit, or the family's token map is not known.
    """
    rows, positions = mask.nonzero(as_tuple=True)
    pictures = _pictures(config, mask, rows, positions, batch) if len(rows) else []
    device = mask.device
    parts: list[tuple[int, int, bool, int, int]] = []
    for number, picture in enumerate(pictures):
        for tile, (height, width) in enumerate(picture.grids):
            parts.append((number, tile, tile == picture.thumbnail, height, width))
    sizes = torch.tensor([height * width for *_, height, width in parts], dtype=torch.long)
    if int(sizes.sum()) != len(rows):
        raise ValueError(
            f"{len(rows)} image tokens in the text, but the pixels of model family {config.model_type!r} make "
            f"{int(sizes.sum())}: the sequence was probably cut by a max_length. Raise max_length or drop the sample."
        )
    which = torch.repeat_interleave(torch.arange(len(parts)), sizes)
    within = torch.arange(len(which)) - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    table = torch.tensor(parts, dtype=torch.long).reshape(-1, 5)[which]
    columns = table[:, 4].clamp(min=1)
    return ImageTokens(
        batch_row=rows,
        position=positions,
        image=table[:, 0].to(device),
        tile=table[:, 1].to(device),
        thumbnail=table[:, 2].bool().to(device),
        row=(within // columns).to(device),
        column=(within % columns).to(device),
        grids=tuple(picture.grids for picture in pictures),
    )


def _runs(rows: Tensor, positions: Tensor) -> list[_Run]:
    breaks = torch.ones(len(rows), dtype=torch.bool)
    rows, positions = rows.cpu(), positions.cpu()
    breaks[1:] = (rows[1:] != rows[:-1]) | (positions[1:] != positions[:-1] + 1)
    starts = breaks.nonzero(as_tuple=True)[0].tolist()
    ends = [*starts[1:], len(rows)]
    return [_Run(int(rows[a]), int(positions[a]), b - a) for a, b in zip(starts, ends, strict=True)]


def _pictures(config: Any, mask: Tensor, rows: Tensor, positions: Tensor, batch: dict[str, Any]) -> list[_Picture]:
    family = config.model_type
    if family in _NEWLINE_TILES:
        raise ValueError(
            f"model family {family!r}: its tiles are separated by learned newline tokens on an irregular grid, and the "
            "map from token to picture position is missing. Families that work: one grid a picture (llava, gemma3, "
            "paligemma, …), image_grid_thw (qwen2_vl, qwen2_5_vl, …), internvl, idefics3, smolvlm."
        )
    if batch.get("image_grid_thw") is not None:
        return _merged_grids(config, batch["image_grid_thw"])
    pixels = batch.get("pixel_values")
    if not isinstance(pixels, torch.Tensor):
        raise ValueError(
            f"the batch holds {len(rows)} image tokens but no 'pixel_values' tensor (got {type(pixels).__name__}): "
            "pass the processor's whole output to the model."
        )
    runs = _runs(rows, positions)
    if family in ("idefics3", "smolvlm"):
        return _split_tiles(mask, batch["input_ids"], runs)
    if pixels.dim() != 4:
        raise ValueError(
            f"model family {family!r} hands over pixel_values of shape {tuple(pixels.shape)}; keepsight knows the "
            "token map of [images, channels, height, width], of image_grid_thw, and of idefics3 and smolvlm tiles."
        )
    if batch.get("image_sizes") is not None:
        return _sized_grids(config, batch["image_sizes"], len(rows))
    if len(rows) % len(pixels):
        raise ValueError(
            f"{len(rows)} image tokens do not divide among {len(pixels)} pictures or tiles of pixel_values (model "
            f"family {family!r}): the sequence was probably cut by a max_length. Raise max_length or drop the sample."
        )
    per_tile = len(rows) // len(pixels)
    side = isqrt(per_tile)
    if side * side != per_tile:
        raise ValueError(
            f"model family {family!r} makes {per_tile} tokens a picture, which is no square grid; "
            "its token map is missing."
        )
    pictures: list[_Picture] = []
    for run in runs:
        if run.length % per_tile:
            raise ValueError(
                f"a run of {run.length} image tokens in row {run.batch_row} is no multiple of the {per_tile} tokens "
                "that a picture makes: the sequence was probably cut by a max_length. Raise max_length or drop it."
            )
        tiles = run.length // per_tile
        if family == "internvl":  # the tiles of one picture stand in one run; the thumbnail, if any, comes last
            pictures.append(_Picture(((side, side),) * tiles, thumbnail=tiles - 1 if tiles > 1 else None))
        else:  # adjacent pictures share a run
            pictures.extend(_Picture(((side, side),)) for _ in range(tiles))
    return pictures


def _merged_grids(config: Any, grid_thw: Tensor) -> list[_Picture]:
    """Qwen-VL and kin: (frames, rows, columns) of patches, merged in square blocks into tokens in row-major order."""
    merge = config.vision_config.spatial_merge_size
    return [_Picture(((rows // merge, columns // merge),) * frames) for frames, rows, columns in grid_thw.tolist()]


def _sized_grids(config: Any, image_sizes: Tensor, n_tokens: int) -> list[_Picture]:
    """Pixtral-style encoders: one token a patch of a picture that keeps its own size."""
    sizes = torch.as_tensor(image_sizes).tolist()
    patch = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    pictures = [_Picture(((height // patch, width // patch),)) for height, width in sizes]
    made = sum(rows * columns for picture in pictures for rows, columns in picture.grids)
    if made != n_tokens:
        raise ValueError(
            f"model family {config.model_type!r}: image_sizes {sizes} make {made} tokens of {patch}×{patch} pixels, "
            f"but the text holds {n_tokens} image tokens; its token map is missing."
        )
    return pictures


def _split_tiles(mask: Tensor, input_ids: Tensor, runs: list[_Run]) -> list[_Picture]:
    """Idefics3 and SmolVLM: every tile has its own run, and the global view closes the picture.

    The token before a run names the tile; a sequence always ends with a global view, which tells its marker's id
    without asking the tokenizer.
    """
    length = runs[0].length
    side = isqrt(length)
    if side * side != length or any(run.length != length for run in runs):
        raise ValueError(
            f"tiles of {sorted({run.length for run in runs})} image tokens: idefics3 and smolvlm make one square grid "
            "a tile, so the sequence was probably cut by a max_length. Raise max_length or drop the sample."
        )
    pictures: list[_Picture] = []
    for batch_row in sorted({run.batch_row for run in runs}):
        own = [run for run in runs if run.batch_row == batch_row]
        markers = [int(input_ids[batch_row, run.start - 1]) for run in own]
        open_tiles = 0
        for marker in markers:
            open_tiles += 1
            if marker == markers[-1]:
                pictures.append(
                    _Picture(((side, side),) * open_tiles, thumbnail=open_tiles - 1 if open_tiles > 1 else None)
                )
                open_tiles = 0
    return pictures
