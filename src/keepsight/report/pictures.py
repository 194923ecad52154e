"""Example pictures for the page: embedded, with the outlines of the mask's objects as vector paths."""

import base64
from dataclasses import dataclass

import numpy as np
from PIL import Image

from keepsight.results import Example
from keepsight.results.thumbnails import encode, shrink

LONGEST_SIDE = 480  # pixels in the page; masks are brought to the same size
IGNORE = 255


@dataclass(frozen=True)
class Picture:
    """An example ready for the page. `outline`: an SVG path in pixel units, "" without a mask; `objects`: one each."""

    uri: str
    width: int
    height: int
    outline: str
    objects: list[str]
    name: str
    caption: str
    pixelated: bool  # small: enlarged without smoothing


def show(example: Example) -> Picture:
    """Embed one example.

    Raises:
        ValueError: if the mask is not [H, W] of the picture.
    """
    image = example.image.convert("RGB")
    mask = example.mask
    if mask is not None and mask.shape != (image.height, image.width):
        raise ValueError(
            f"the mask of example '{example.name}' is {mask.shape}, its picture {(image.height, image.width)} "
            "(rows, columns); give a mask of the picture's size"
        )
    image = shrink(image, LONGEST_SIDE)
    if mask is not None:
        mask = np.asarray(Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST))
    values = [] if mask is None else sorted(set(np.unique(mask).tolist()) - {0, IGNORE})
    kind, content = encode(image)
    return Picture(
        uri=f"data:image/{kind};base64,{base64.b64encode(content).decode()}",
        width=image.width,
        height=image.height,
        outline="" if mask is None else outline(mask),
        objects=[outline(np.where(mask == value, value, 0)) for value in values],
        name=example.name,
        caption=example.caption,
        pixelated=kind == "png",
    )


def outline(mask: np.ndarray) -> str:
    """The borders of the objects in a mask [H, W] as one SVG path along pixel edges.

    A border runs wherever two neighbouring pixels hold different objects; background (0) and ignore (255) count as
    one and the same, and so does what lies outside the picture.
    """
    objects = np.where(mask == IGNORE, 0, mask).astype(np.int16)
    padded = np.pad(objects, 1)
    across = padded[1:, 1:-1] != padded[:-1, 1:-1]  # [H + 1, W]: edges that run left to right
    down = padded[1:-1, 1:] != padded[1:-1, :-1]  # [H, W + 1]: edges that run top to bottom
    horizontal = [f"M{start} {row}H{end}" for row, start, end in _stretches(across)]
    vertical = [f"M{column} {start}V{end}" for column, start, end in _stretches(down.T)]
    return "".join(horizontal + vertical)


def _stretches(edges: np.ndarray) -> list[tuple[int, int, int]]:
    """(line, start, end) of every unbroken stretch of True along dim 1."""
    steps = np.diff(np.pad(edges.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    lines, starts = np.nonzero(steps == 1)
    _, ends = np.nonzero(steps == -1)  # row-major like the starts, so that they pair up
    return list(zip(lines.tolist(), starts.tolist(), ends.tolist(), strict=True))
