"""From a processor's batch to the image, tile, row and column of every visual token.

There is no uniform way to ask a transformers model where a visual token sits in its picture; each rule here reads it
from what the processor hands over (pixel tensors, grids) and from the runs of placeholder tokens, never from a
hard-coded count, and raises when the two do not fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from keepsight.vlm.newlines import NEWLINE_TILES, newline_grids, newline_tokens

# Families whose image tokens attend to each other in both directions (or to the whole prompt).
BIDIRECTIONAL_IMAGES = frozenset({"gemma3", "paligemma"})
# Families whose pictures may come in tiles, each a picture of `pixel_values`: the tiles of one picture stand in one run
# of placeholders and the thumbnail comes last; or each tile has its own run, and a token before it tells whether it is
# the whole, which comes last or first.
_TILES_IN_ONE_RUN = frozenset({"internvl", "got_ocr2"})
_WHOLE_LAST = frozenset({"idefics3", "smolvlm", "aya_vision", "llama4"})
_WHOLE_FIRST = frozenset({"ovis2"})
# Tiles that would pass for pictures of their own.
_UNKNOWN_TILES = frozenset({"cohere2_vision"})


@dataclass(frozen=True)
class ImageTokens:
    """The T visual tokens of a batch, ordered by batch row, then position. All tensors are ``[T]`` on one device.

    Attributes:
        batch_row: row of the batch.
        position: position in the sequence.
        image: number of the picture, 0 … n_images-1 in order over the batch.
        tile: number of the tile within its picture (0 where pictures are not tiled). Of LLaVA-NeXT and LLaVA-OneVision,
            tile 0 is the whole and tile 1 the mosaic of the others, without its padding and without newline tokens.
        thumbnail: whether the tile is the downscaled whole of a picture that has other tiles as well.
        row, column: place within the tile's grid. In families whose tokens come out of a resampler and stand for no
            place (`resampled`), the row is 0 and the column the number of the query.
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


def resampled(config: Any) -> bool:
    """Whether the visual tokens are queries of a resampler, each of which looks at the whole picture."""
    return getattr(config, "perceiver_config", None) is not None or getattr(config, "qformer_config", None) is not None


def image_tokens(config: Any, mask: Tensor, batch: dict[str, Any], core: Any = None) -> ImageTokens:
    """Locate every visual token of a batch.

    Args:
        config: the model's configuration.
        mask: ``[B, S]`` bool, the placeholder positions.
        batch: the processor's output (``pixel_values``, ``image_grid_thw``, …).
        core: the model's module that merges pictures and text; families with newline tokens are asked through it.

    Raises:
        ValueError: when placeholders and pixels do not fit, or the family's token map is not known.
    """
    rows, positions = mask.nonzero(as_tuple=True)
    device = mask.device
    if config.model_type in NEWLINE_TILES and len(rows):
        flags = newline_tokens(core, batch)
        _fit(config, len(rows), sum(map(len, flags)))
        patches = ~torch.cat(flags).to(device)
        rows, positions = rows[patches], positions[patches]
        grids = newline_grids(core, flags)
        pictures = [_Picture(grid, thumbnail=0 if len(grid) > 1 else None) for grid in grids]
    else:
        pictures = _pictures(config, mask, rows, positions, batch) if len(rows) else []
    parts: list[tuple[int, int, bool, int, int]] = []
    for number, picture in enumerate(pictures):
        for tile, (height, width) in enumerate(picture.grids):
            parts.append((number, tile, tile == picture.thumbnail, height, width))
    sizes = torch.tensor([height * width for *_, height, width in parts], dtype=torch.long)
    _fit(config, len(rows), int(sizes.sum()))
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


def _fit(config: Any, n_tokens: int, made: int) -> None:
    if n_tokens != made:
        raise ValueError(
            f"{n_tokens} image tokens in the text, but the pixels of model family {config.model_type!r} make "
            f"{made}: the sequence was probably cut by a max_length. Raise max_length or drop the sample."
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
    if batch.get("image_grid_thw") is not None:
        return _merged_grids(config, batch["image_grid_thw"])
    pixels = batch.get("pixel_values")
    if not isinstance(pixels, torch.Tensor):
        raise ValueError(
            f"the batch holds {len(rows)} image tokens but no 'pixel_values' tensor (got {type(pixels).__name__}): "
            "pass the processor's whole output to the model."
        )
    runs = _runs(rows, positions)
    if family in _WHOLE_LAST | _WHOLE_FIRST:
        if pixels.dim() == 4 and len(pixels) != len(runs):
            raise ValueError(
                f"{len(pixels)} tiles in pixel_values, but {len(runs)} runs of image tokens (model family {family!r}): "
                "the sequence was probably cut by a max_length. Raise max_length or drop the sample."
            )
        return _split_tiles(batch["input_ids"], runs, whole_first=family in _WHOLE_FIRST)
    if family in _UNKNOWN_TILES:
        raise ValueError(
            f"model family {family!r}: which tiles make a picture is missing, and a tile must not count as a picture "
            "of its own. docs/support.md lists the families that work."
        )
    if resampled(config):
        return _queries(config, runs)
    if pixels.dim() != 4:
        raise ValueError(
            f"model family {family!r} hands over pixel_values of shape {tuple(pixels.shape)}; keepsight knows the "
            "token map of [images, channels, height, width], of image_grid_thw, and of the tiles of "
            f"{sorted(_WHOLE_LAST | _WHOLE_FIRST | NEWLINE_TILES)}."
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
        if family in _TILES_IN_ONE_RUN:
            pictures.append(_Picture(((side, side),) * tiles, thumbnail=tiles - 1 if tiles > 1 else None))
        else:  # adjacent pictures share a run
            pictures.extend(_Picture(((side, side),)) for _ in range(tiles))
    return pictures


def merge_side(config: Any) -> int:
    """Patches a side that one visual token of a family with `image_grid_thw` merges."""
    vision = config.vision_config
    if hasattr(vision, "merge_kernel_size"):  # Kimi
        return int(vision.merge_kernel_size[0])
    return int(vision.spatial_merge_size)


def _merged_grids(config: Any, grid_thw: Tensor) -> list[_Picture]:
    """Qwen-VL and kin: (frames, rows, columns) of patches, merged in square blocks into tokens in row-major order."""
    merge = merge_side(config)
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


def _split_tiles(input_ids: Tensor, runs: list[_Run], whole_first: bool) -> list[_Picture]:
    """Every tile has its own run, and the whole opens or closes the picture.

    The token before a run names the tile; a sequence's last (first) run always is a whole, which tells its marker's id
    without asking the tokenizer.
    """
    length = runs[0].length
    side = isqrt(length)
    if side * side != length or any(run.length != length for run in runs):
        raise ValueError(
            f"tiles of {sorted({run.length for run in runs})} image tokens, where one square grid a tile is expected: "
            "the sequence was probably cut by a max_length. Raise max_length or drop the sample."
        )
    pictures: list[_Picture] = []
    for batch_row in sorted({run.batch_row for run in runs}):
        markers = [int(input_ids[batch_row, run.start - 1]) for run in runs if run.batch_row == batch_row]
        whole = markers[0 if whole_first else -1]
        at = [number for number, marker in enumerate(markers) if marker == whole]
        edges = [*at, len(markers)] if whole_first else [0, *(number + 1 for number in at)]
        for start, end in pairwise(edges):
            tiles = end - start
            thumbnail = None if tiles == 1 else 0 if whole_first else tiles - 1
            pictures.append(_Picture(((side, side),) * tiles, thumbnail))
    return pictures


def _queries(config: Any, runs: list[_Run]) -> list[_Picture]:
    """Resamplers: a run of queries for each picture, in a row because they have no places."""
    lengths = sorted({run.length for run in runs})
    if len(lengths) > 1:
        raise ValueError(
            f"pictures of {lengths} image tokens, but the resampler of model family {config.model_type!r} makes as "
            "many of each: the sequence was probably cut by a max_length. Raise max_length or drop the sample."
        )
    return [_Picture(((1, run.length),)) for run in runs]
