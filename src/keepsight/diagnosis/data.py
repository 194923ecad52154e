"""Pictures with labels and object masks: from a folder, a list or a Hugging Face dataset, in a fixed order."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from keepsight.diagnosis.masks import components, read_mask
from keepsight.images import inside, open_image, refuse_url

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True)
class Picture:
    """One picture: where its pixels and its mask come from. Nothing is read before `open`."""

    name: str
    source: Any  # Path, PIL image, bytes, or a function that returns one of them
    mask: Any = None  # Path, array, PIL image, a function that returns one of them, or None

    def open(self, split_components: bool = False) -> tuple[Image.Image, np.ndarray | None]:
        """The picture, upright, in RGB, and its mask [H, W] uint8 (None without one).

        Raises:
            ImageError: the picture or the mask is missing, truncated or no picture.
            ValueError: the mask is no index mask, or of another size than its picture.
        """
        image = open_image(self.source, self.name)
        if self.mask is None:
            return image, None
        mask = read_mask(self.mask, self.name)
        if mask.shape != (image.height, image.width):
            raise ValueError(
                f"the mask of '{self.name}' is {mask.shape[1]} × {mask.shape[0]} pixels, its picture "
                f"{image.width} × {image.height}; a mask has the size of its picture as stored, turned upright"
            )
        return image, components(mask) if split_components else mask


@dataclass(frozen=True)
class Pictures:
    """Pictures in a fixed order, and label sets: {target: one label (or None) per picture}."""

    items: Sequence[Picture]
    labels: Mapping[str, Sequence[str | None]]

    def __len__(self) -> int:
        return len(self.items)


def find_pictures(images: Any, labels: Any = None, masks: Any = None) -> Pictures:
    """Pictures from what a user has.

    Args:
        images: a folder (a class per subfolder, or flat), a list of paths or PIL images, or a Hugging Face dataset
            with an image column.
        labels: None (the subfolders, or the dataset's class column), one label per picture, or {target: labels}.
        masks: None, a folder with `<stem>.png` for a picture of that stem (subfolders mirrored), one array or None
            per picture, or the name of a dataset's column.

    Raises:
        ValueError: nothing found, an ambiguous folder, a path that leaves the folder, a URL, or lists of other lengths.
        FileNotFoundError: a folder that does not exist.
    """
    if isinstance(images, (str, Path)):
        root = _folder(images, "image folder")
        relative, found = _walk(root)
        sources: list[Any] = [root / path for path in relative]
        names = [path.as_posix() for path in relative]
    elif hasattr(images, "column_names") and hasattr(images, "features"):
        sources, found = _dataset(images)
        names = [str(i) for i in range(len(sources))]
    else:
        sources, found = [_listed(entry) for entry in images], {}
        names = [str(entry) if isinstance(entry, Path) else f"picture {i}" for i, entry in enumerate(sources)]
    if not sources:
        raise ValueError(f"no pictures in {_short(images)}; expected files ending in {', '.join(sorted(SUFFIXES))}")
    items = [
        Picture(name, source, mask)
        for name, source, mask in zip(names, sources, _masks(masks, names, images), strict=True)
    ]
    return Pictures(items, _labels(labels, len(items)) if labels is not None else found)


def _folder(path: str | Path, what: str) -> Path:
    refuse_url(str(path))
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"{what} '{path}' does not exist or is no folder; check the path")
    return root.resolve()


def _walk(root: Path) -> tuple[list[Path], dict[str, list[str | None]]]:
    paths = sorted(
        path.relative_to(root)
        for path in root.rglob("*")
        if path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
    for path in paths:
        inside(path, root)
    nested = [len(path.parts) > 1 for path in paths]
    if any(nested) and not all(nested):
        raise ValueError(
            f"'{root}' holds pictures directly (such as '{paths[nested.index(False)]}') and in subfolders ("
            f"'{paths[nested.index(True)]}'); expected one subfolder per class, or none"
        )
    return paths, {"class": [path.parts[0] for path in paths]} if any(nested) else {}


def _listed(entry: Any) -> Any:
    if isinstance(entry, Image.Image):
        return entry
    if isinstance(entry, (str, os.PathLike)):
        refuse_url(os.fspath(entry))
        return Path(entry)
    raise ValueError(f"a picture is a path or a PIL image; got {type(entry).__name__}")


def _dataset(dataset: Any) -> tuple[list[Any], dict[str, list[str | None]]]:
    kinds = {name: type(feature).__name__ for name, feature in dataset.features.items()}
    columns = [name for name, kind in kinds.items() if kind == "Image"]
    column = "image" if "image" in columns else columns[0] if columns else None
    if column is None:
        raise ValueError(f"the dataset has no image column; its columns are {kinds}. Cast one to datasets.Image")
    found: dict[str, list[str | None]] = {}
    for name, kind in kinds.items():
        if kind == "ClassLabel":
            # An unlabelled row is -1 in datasets.
            found["class" if name == "label" else name] = [
                dataset.features[name].int2str(value) if value is not None and value >= 0 else None
                for value in dataset[name]
            ]
    return [partial(_cell, dataset, column, i) for i in range(len(dataset))], found


def _cell(dataset: Any, column: str, index: int) -> Any:
    return dataset[index][column]


def _labels(labels: Any, n: int) -> dict[str, list[str | None]]:
    sets = labels if isinstance(labels, Mapping) else {"class": labels}
    for target, values in sets.items():
        if isinstance(values, str) or len(values) != n:
            raise ValueError(
                f"label set '{target}' must be a list with one label for each of the {n} pictures; got {_short(values)}"
            )
    return {str(t): [None if value is None else str(value) for value in values] for t, values in sets.items()}


def _masks(masks: Any, names: Sequence[str], images: Any) -> list[Any]:
    if masks is None:
        return [None] * len(names)
    if isinstance(masks, str) and masks in getattr(images, "column_names", ()):
        return [partial(_cell, images, masks, i) for i in range(len(names))]
    if isinstance(masks, (str, Path)):
        root = _folder(masks, "mask folder")
        base = Path(images).resolve() if isinstance(images, (str, Path)) else None
        found: list[Any] = []
        for name in names:
            path = Path(name if base is not None else Path(name).name).with_suffix(".png")
            if (root / path).is_file():
                inside(path, root, "mask")
                found.append(root / path)
            else:
                found.append(None)
        if not any(found):
            expected = Path(names[0]).with_suffix(".png")
            raise ValueError(
                f"mask folder '{masks}' has no mask for any of the {len(names)} pictures; expected '{expected}' "
                f"for '{names[0]}'"
            )
        return found
    if len(masks) != len(names):
        raise ValueError(f"{len(masks)} masks for {len(names)} pictures; give one (or None) for each")
    return list(masks)


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, (str, Path)) else f"a {type(value).__name__}"
    return f"{text} of {len(value)}" if isinstance(value, (list, tuple)) else text
