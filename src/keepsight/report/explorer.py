"""Pictures and their similarity maps, packed for explorer.js: each map as deflated bytes in base64."""

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from keepsight.report.curves import Run
from keepsight.report.pictures import IGNORE, Picture, show
from keepsight.results import SimilarityMap

BUDGET = 18_000_000  # characters of maps in a page, which with Plotly's 5 MB and the pictures stays under 25 MB


@dataclass(frozen=True)
class Packed:
    """One run's map of one picture: what JSON tells of it, and its numbers."""

    info: dict[str, Any]
    data: str


@dataclass
class Shown:
    """A picture of the page, with the map of each run that has one, by the run's number."""

    picture: Picture
    maps: dict[int, Packed] = field(default_factory=dict)


def gather(runs: Sequence[Run], budget: int = BUDGET) -> tuple[list[Shown], list[str]]:
    """Each example once, because runs of one comparison mostly hold the same ones; its maps side by side.

    Pictures past `budget` characters of maps are shown without theirs.

    Returns:
        The pictures, and the words that the lens reads in all of them, to which the maps point.
    """
    found: dict[tuple[str, str], Shown] = {}
    waiting: dict[tuple[str, str], dict[int, tuple[SimilarityMap, np.ndarray | None]]] = {}
    for number, run in enumerate(runs):
        for example in run.loaded.examples:
            picture = show(example)
            key = picture.uri, picture.caption
            found.setdefault(key, Shown(picture))
            if example.map is not None:
                waiting.setdefault(key, {})[number] = example.map, example.mask
    left, words = budget, dict[str, int]()
    for key, maps in waiting.items():
        packed = {number: pack(*each, words) for number, each in maps.items()}
        left -= sum(len(each.data) for each in packed.values())
        if left < 0:
            break
        found[key].maps = packed
    return list(found.values()), list(words)


def pack(found: SimilarityMap, mask: np.ndarray | None, words: dict[str, int]) -> Packed:
    """A map as explorer.js reads it: one little-endian array after the other, in the order of `parts`.

    Args:
        words: a table of words and their places, which grows by this map's.
    """
    layers, n, components = found.codes.shape
    whole = found.thumbnail if len(found.thumbnail) else np.zeros(n, dtype=bool)
    spoken = found.top.size > 0
    boxes = cells(found)
    places = np.array([words.setdefault(str(word), len(words)) for word in found.words], dtype=np.int32)
    parts = (
        boxes.astype("<f4"),  # [N, 4]: left, top, width, height in shares of the picture
        (places[found.top] if spoken else np.zeros((layers, 0))).astype("<i4"),  # [L, N]
        found.row.astype("<i2"),
        found.column.astype("<i2"),
        found.codes.transpose(0, 2, 1),  # [L, K, N]: packs best with one component after the other
        _objects(boxes, mask),  # [N]
        whole.astype(np.uint8),  # [N]
    )
    data = zlib.compress(b"".join(np.ascontiguousarray(part).tobytes() for part in parts), 6)
    info = {
        "layers": found.layers.tolist(),
        "n": n,
        "components": components,
        "spoken": spoken,
        "error": [round(float(error), 4) for error in found.error],
        "tiled": bool(whole.any()) and not bool(whole.all()),
    }
    return Packed(info, base64.b64encode(data).decode())


def cells(found: SimilarityMap) -> np.ndarray:
    """[N, 4]: left, top, width and height of each token's patch in shares of the picture; NaN for padding.

    A patch is as wide as its neighbour in the row is far, and as high as the one in the column; ours.
    """
    boxes = np.full((len(found.centres), 4), np.nan)
    for tile in np.unique(found.tile):
        inside = np.flatnonzero(found.tile == tile)
        size = [
            _pitch(found.centres[inside, axis], across[inside], along[inside])
            for axis, across, along in ((0, found.row, found.column), (1, found.column, found.row))
        ]
        boxes[inside] = np.column_stack([found.centres[inside] - np.array(size) / 2, np.tile(size, (len(inside), 1))])
    boxes[np.isnan(found.centres).any(axis=1)] = np.nan
    return boxes


def _pitch(at: np.ndarray, line: np.ndarray, place: np.ndarray) -> float:
    """Median distance of neighbours: tokens of one `line` at places one apart; the whole picture where none are."""
    order = np.lexsort((place, line))
    step = np.diff(at[order])[(np.diff(line[order]) == 0) & (np.diff(place[order]) == 1)]
    step = step[np.isfinite(step)]
    return float(np.median(step)) if len(step) else 1.0


def _objects(boxes: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """uint8 [N]: the object, counted from 1 in the order of their values, that covers at least half a patch; else 0."""
    owner = np.zeros(len(boxes), dtype=np.uint8)
    if mask is None:
        return owner
    height, width = mask.shape
    placed = np.flatnonzero(np.isfinite(boxes).all(axis=1))
    left, top, across, down = boxes[placed].T
    first, below = ((height * edge).round().clip(0, height).astype(int) for edge in (top, top + down))
    start, beyond = ((width * edge).round().clip(0, width).astype(int) for edge in (left, left + across))
    area = np.maximum((below - first) * (beyond - start), 1)
    best = np.full(len(placed), 0.5)
    for number, value in enumerate((value for value in np.unique(mask) if value not in (0, IGNORE)), start=1):
        sums = np.pad((mask == value).cumsum(axis=0, dtype=np.int64).cumsum(axis=1), ((1, 0), (1, 0)))
        covered = sums[below, beyond] - sums[first, beyond] - sums[below, start] + sums[first, start]
        share = covered / area
        more = (share >= best) & ((share > best) | (owner[placed] == 0))
        owner[placed[more]], best[more] = number, share[more]
    return owner
