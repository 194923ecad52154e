"""Object masks: index pictures of the picture's size, 0 background, 255 ignored, other values objects."""

from __future__ import annotations

from typing import Any

import numpy as np

from keepsight.images import decode

IGNORE = 255
MAX_OBJECTS = 254  # what a uint8 mask can name beside background and ignore


def read_mask(source: Any, name: str) -> np.ndarray:
    """[H, W] uint8: 0 background, 255 ignore, other values objects.

    Raises:
        ImageError: it cannot be read.
        ValueError: it is a colour picture, or holds values that uint8 does not.
    """
    if isinstance(source, np.ndarray | list):
        array = np.asarray(source)
    else:
        image = decode(source, f"the mask of '{name}'")
        if image.mode not in ("1", "L", "P", "I", "I;16"):
            raise ValueError(
                f"the mask of '{name}' is a {image.mode} picture; expected one channel (mode L or P): 0 background, "
                "255 ignore and other values objects"
            )
        array = np.asarray(image)
    if array.dtype.kind not in "biu" and not (array.dtype.kind == "f" and (array == np.round(array)).all()):
        raise ValueError(
            f"the mask of '{name}' holds {array.dtype} values that are not whole numbers; expected 0 for background, "
            "255 for ignore and other whole numbers for objects: round it, or cut it at a threshold"
        )
    if array.ndim != 2 or (array.size and (array.min() < 0 or array.max() > 255)):
        raise ValueError(
            f"the mask of '{name}' must be a [H, W] array of values 0 … 255; got shape {array.shape}, values "
            f"{array.min()} … {array.max()}"
        )
    return array.astype(np.uint8)


def components(mask: np.ndarray) -> np.ndarray:
    """Connected parts (8 neighbours) of each value of a semantic mask as objects of their own, largest first.

    For masks such as COCO-Stuff's, where one value covers every instance. At most 254 objects fit; smaller parts
    beyond them become 255, ignored.
    """
    from scipy import ndimage

    codes = np.zeros(mask.shape, np.int64)
    for value in np.unique(mask):
        if value not in (0, IGNORE):
            labelled, _ = ndimage.label(mask == value, structure=np.ones((3, 3)))
            codes = np.where(labelled > 0, codes.max() + labelled, codes)
    result, _ = number_objects(codes)
    result[mask == IGNORE] = IGNORE
    return result


def number_objects(codes: np.ndarray) -> tuple[np.ndarray, dict[int, int]]:
    """Objects of any codes (0: none) → [H, W] uint8 with 1 for the largest, and {number: code}.

    At most 254 fit; smaller ones beyond them become 255, ignored.
    """
    found, place, counts = np.unique(codes, return_inverse=True, return_counts=True)
    order = np.lexsort((found, -counts))
    order = order[found[order] != 0]
    numbers = np.zeros(len(found), np.uint8)
    numbers[order] = np.minimum(np.arange(1, len(order) + 1), IGNORE)
    kept = found[order[:MAX_OBJECTS]].tolist()
    return numbers[place.reshape(codes.shape)], dict(enumerate(kept, start=1))
