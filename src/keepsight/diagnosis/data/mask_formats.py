"""Masks as public data sets keep them: index pictures, COCO-Stuff, ADE20K and PASCAL VOC."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from keepsight.diagnosis.data.masks import IGNORE, components, number_objects, read_mask
from keepsight.images import decode

# Format → what the names of its masks end in, after the picture's stem, in the order in which they are tried.
FORMATS = {
    "index": (".png",),
    "coco-stuff": ("_labelTrainIds.png", ".png"),
    "ade20k": ("_seg.png", ".png"),
    "voc": (".png",),
}
VOC_CLASSES = [
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]
COCO_LARGEST, ADE_LARGEST = 182, 150  # ids that the formats have


def check_format(format: str) -> None:
    """Raises ValueError for a format that does not exist."""
    if format not in FORMATS:
        raise ValueError(f"mask_format is {format!r}; allowed: {', '.join(FORMATS)}")


def read_objects(
    source: Any, name: str, format: str = "index", split_components: bool = False
) -> tuple[np.ndarray, dict[int, str]]:
    """A mask in any of the formats as objects.

    index: 0 background, 255 ignore, other values objects. coco-stuff: 0 … 182 are classes, 0 among them, 255 is
    unlabelled (`stuffthingmaps` and `_labelTrainIds.png`). ade20k: colour pictures hold an object in B and its class in
    R // 10 · 256 + G; those of one channel (SceneParsing) classes 1 … 150, and 0 for none. voc: 0 background, 255 the
    border; objects in `SegmentationObject` (their classes are those of `../SegmentationClass`), or classes.

    Args:
        source: a file, an array, a picture or the bytes of one.
        split_components: make objects of the connected parts of each value.

    Returns:
        [H, W] uint8 (0 background, 255 ignore, other values objects), and the class of each object where it is known.

    Raises:
        ImageError: it cannot be read. ValueError: it is not of this format.
    """
    if format == "ade20k":
        objects, classes = _ade20k(source, name)
    elif format == "coco-stuff":
        objects, classes = _coco_stuff(read_mask(source, name), name)
    else:
        objects = read_mask(source, name)
        classes = _voc_classes(source, objects, name) if format == "voc" else {}
    if not split_components:
        return objects, classes
    known = classes or {value: f"class {value}" for value in _values(objects)}
    parts = components(objects)
    numbers, first = np.unique(parts, return_index=True)
    found = zip(numbers.tolist(), objects.ravel()[first].tolist(), strict=True)
    return parts, {part: known[value] for part, value in found if part not in (0, IGNORE) and value in known}


def _values(objects: np.ndarray) -> list[int]:
    return [int(value) for value in np.unique(objects) if value not in (0, IGNORE)]


def _coco_stuff(ids: np.ndarray, name: str) -> tuple[np.ndarray, dict[int, str]]:
    labelled = ids[ids != IGNORE]
    if labelled.size and labelled.max() > COCO_LARGEST:
        raise ValueError(
            f"the mask of '{name}' holds the value {labelled.max()}; COCO-Stuff's are 0 … {COCO_LARGEST}, and 255 for "
            "unlabelled. Where 0 is unlabelled, as in its stuff_*_pixelmaps, give mask_format='index' "
            "(--mask-format index)"
        )
    objects = np.where(ids == IGNORE, IGNORE, ids + 1).astype(np.uint8)
    return objects, {value: f"class {value - 1}" for value in _values(objects)}


def _ade20k(source: Any, name: str) -> tuple[np.ndarray, dict[int, str]]:
    array = source if isinstance(source, np.ndarray) else None
    if array is None and not isinstance(source, list):
        picture = decode(source, f"the mask of '{name}'")
        array = np.asarray(picture) if picture.mode == "RGB" else None
        source = picture
    if array is None or array.ndim != 3:
        ids = read_mask(source, name)
        if ids.size and ids.max() > ADE_LARGEST:
            raise ValueError(
                f"the mask of '{name}' holds the value {ids.max()}; ADE20K's masks of one channel hold 0 … "
                f"{ADE_LARGEST}. Give mask_format='index' (--mask-format index) if 255 is to be ignored"
            )
        return ids, {value: f"class {value}" for value in _values(ids)}
    red, green, blue = (array[..., channel].astype(np.int64) for channel in range(3))
    kind = red // 10 * 256 + green
    codes = np.where((blue > 0) & (kind > 0), kind * 256 + blue, 0)
    objects, numbers = number_objects(codes)
    return objects, {number: f"class {code // 256}" for number, code in numbers.items()}


def _voc_classes(source: Any, objects: np.ndarray, name: str) -> dict[int, str]:
    """Of each object, from the masks of classes that lie beside those of objects; none for other masks."""
    folder = source.parent.name if isinstance(source, Path) else ""
    if folder == "SegmentationClass":
        kinds = objects
    elif (
        folder == "SegmentationObject"
        and (beside := source.parent.parent / "SegmentationClass" / source.name).is_file()
    ):
        kinds = read_mask(beside, name)
        if kinds.shape != objects.shape:
            raise ValueError(f"'{beside}' and '{source}' are of different sizes; both belong to one picture")
    else:
        return {}
    found = {}
    for value in _values(objects):
        counts = np.bincount(kinds[objects == value], minlength=len(VOC_CLASSES) + 1)[1 : len(VOC_CLASSES) + 1]
        if counts.any():
            found[value] = VOC_CLASSES[int(counts.argmax())]
    return found
