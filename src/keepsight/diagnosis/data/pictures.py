"""Pictures with labels and object masks: from a folder, a list or a Hugging Face dataset, in a fixed order."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from keepsight.diagnosis.data.dataset_rows import LABEL_COLUMNS, dataset_columns
from keepsight.diagnosis.data.mask_files import among_pictures, find_masks, folder
from keepsight.diagnosis.data.mask_formats import check_format, read_objects
from keepsight.images import inside, open_image, refuse_url

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
# Pictures, too, but of formats that are not read: left out of a folder, and counted.
UNREAD = frozenset({".avif", ".dng", ".eps", ".heic", ".heif", ".jfif", ".jp2", ".jxl", ".psd", ".svg"})


@dataclass(frozen=True)
class Picture:
    """One picture: where its pixels and its mask come from. Nothing is read before `open`."""

    name: str
    source: Any  # Path, PIL image, bytes, or a function that returns one of them
    mask: Any = None  # Path, array, PIL image, a function that returns one of them, or None

    mask_format: str = "index"

    def open(self, split_components: bool = False) -> tuple[Image.Image, np.ndarray | None]:
        """The picture, upright, in RGB, and its mask [H, W] uint8 (None without one).

        Raises:
            ImageError: the picture or the mask is missing, truncated or no picture.
            ValueError: the mask is not of its format, or of another size than its picture.
        """
        return self.read(split_components)[:2]

    def read(self, split_components: bool = False) -> tuple[Image.Image, np.ndarray | None, dict[int, str]]:
        """`open`, and the class of each object where its mask tells."""
        image = open_image(self.source() if callable(self.source) else self.source, self.name)
        given = self.mask() if callable(self.mask) else self.mask
        if given is None:
            return image, None, {}
        mask, classes = read_objects(given, self.name, self.mask_format, split_components)
        if mask.shape != (image.height, image.width):
            raise ValueError(
                f"the mask of '{self.name}' is {mask.shape[1]} × {mask.shape[0]} pixels, its picture "
                f"{image.width} × {image.height}; a mask has the size of its picture as viewers show it, "
                "its EXIF orientation applied"
            )
        return image, mask, classes


@dataclass(frozen=True)
class Pictures:
    """Pictures in a fixed order, and label sets: {target: one label (or None) per picture}.

    repeated: how many of a list of files are there more than once; unread: files of a folder in formats not read.
    """

    items: Sequence[Picture]
    labels: Mapping[str, Sequence[str | None]] = field(default_factory=dict)
    unlabelled: str = "no labels were given"  # why there are no label sets, where there are none
    repeated: int = 0
    unread: int = 0

    def __len__(self) -> int:
        return len(self.items)

    def take(self, indices: Sequence[int]) -> Pictures:
        """These pictures only, in this order."""
        labels = {target: [values[i] for i in indices] for target, values in self.labels.items()}
        return replace(self, items=[self.items[i] for i in indices], labels=labels)

    def without_masks(self) -> Pictures:
        """The same, and no mask is ever read."""
        return replace(self, items=[replace(item, mask=None) for item in self.items])


def find_pictures(
    images: Any, labels: Any = None, masks: Any = None, mask_format: str = "index", mask_suffix: str | None = None
) -> Pictures:
    """Pictures from what a user has.

    Args:
        images: a folder (a class per subfolder, or flat), a list of paths or PIL images, or a Hugging Face dataset
            with an image column.
        labels: None (the subfolders, or the dataset's ClassLabel columns and its text columns named label, labels or
            class), one label per picture, or {target: labels}.
        masks: None, a folder with `<stem>.png` for a picture of that stem (subfolders mirrored for a folder of
            pictures), one array or None per picture, or the name of a dataset's column. In the folder of the pictures
            itself PNGs are masks (with a suffix, files that end in it) and no pictures.
        mask_format: "index", "coco-stuff", "ade20k" or "voc", see `read_objects`.
        mask_suffix: what the masks' names end in after the picture's stem; None takes the format's own.

    Raises:
        ValueError: nothing found, an ambiguous folder, a path that leaves the folder, a URL, or lists of other lengths.
        FileNotFoundError: a folder that does not exist.
    """
    unlabelled, unread = "no labels were given", 0
    _refuse_single(images)
    check_format(mask_format)
    if isinstance(images, (str, Path)):
        root = folder(images, "image folder")
        relative, found, unread = _walk(root, among_pictures(images, masks, mask_suffix))
        unlabelled = "no labels: pictures in one flat folder have no classes"
        sources: list[Any] = [root / path for path in relative]
        names = [path.as_posix() for path in relative]
    elif hasattr(images, "column_names") and hasattr(images, "features"):
        if len(images) == 0:
            raise ValueError("the dataset is empty: it has no rows, and so no pictures")
        sources, found = dataset_columns(images)
        unlabelled = (
            f"no labels: none of the dataset's columns ({', '.join(images.column_names)}) is a ClassLabel, or holds "
            f"text and is named {' or '.join(LABEL_COLUMNS)}"
        )
        names = [str(i) for i in range(len(sources))]
    else:
        sources, found = [_listed(entry) for entry in images], {}
        names = [str(entry) if isinstance(entry, Path) else f"picture {i}" for i, entry in enumerate(sources)]
    if not sources:
        others = f", not {', '.join(sorted(UNREAD))} ({unread} files)" if unread else ""
        raise ValueError(
            f"no pictures in {_short(images)}; expected files ending in {', '.join(sorted(SUFFIXES))}{others}"
        )
    items = [
        Picture(name, source, mask, mask_format)
        for name, source, mask in zip(
            _numbered(names), sources, find_masks(masks, names, images, mask_format, mask_suffix), strict=True
        )
    ]
    given = _labels(labels, len(items)) if labels is not None else found
    return Pictures(items, given, unlabelled, len(names) - len(set(names)), unread)


def _numbered(names: Sequence[str]) -> list[str]:
    """Names that are there once: a file listed again is "name (2)", as what a picture adds is kept by name."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return result


def _refuse_single(images: Any) -> None:
    many = isinstance(images, (str, Path)) or hasattr(images, "__iter__") or hasattr(images, "__getitem__")
    if isinstance(images, Image.Image) or not many:
        raise ValueError(
            f"images is {'one picture' if isinstance(images, Image.Image) else _short(images)}; give a folder, a list "
            "of paths or PIL images, or a Hugging Face dataset"
        )


def _walk(root: Path, mask_ending: str) -> tuple[list[Path], dict[str, list[str | None]], int]:
    """The pictures, their classes where they lie in subfolders, and how many more are in formats that are not read."""
    every = list(_files(root, root, (os.path.realpath(root),)))
    files = [path for path in every if path.suffix.lower() in SUFFIXES]
    paths = sorted(path.relative_to(root) for path in files if not (mask_ending and path.name.endswith(mask_ending)))
    for path in paths:
        inside(path, root)
    nested = [len(path.parts) > 1 for path in paths]
    if any(nested) and not all(nested):
        raise ValueError(
            f"'{root}' holds pictures directly (such as '{paths[nested.index(False)]}') and in subfolders ("
            f"'{paths[nested.index(True)]}'); expected one subfolder per class, or none"
        )
    classes: list[str | None] = [path.parts[0] for path in paths]
    return paths, {"class": classes} if any(nested) else {}, len(every) - len(files)


def _files(folder: Path, root: Path, above: tuple[str, ...]) -> Iterator[Path]:
    """Every picture below `folder`, linked folders inside `root` included; what starts with a dot is left out."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            relative = path.relative_to(root)
            real = os.path.realpath(inside(relative, root))
            if real in above:
                raise ValueError(f"'{relative}' in '{root}' is a link to a folder that holds it; remove the link")
            yield from _files(path, root, (*above, real))
        elif path.suffix.lower() in SUFFIXES | UNREAD:
            yield path


def _listed(entry: Any) -> Any:
    if isinstance(entry, Image.Image):
        return entry
    if isinstance(entry, (str, os.PathLike)):
        refuse_url(os.fspath(entry))
        return Path(entry)
    raise ValueError(f"a picture is a path or a PIL image; got {type(entry).__name__}")


def _labels(labels: Any, n: int) -> dict[str, list[str | None]]:
    sets = labels if isinstance(labels, Mapping) else {"class": labels}
    for target, values in sets.items():
        if isinstance(values, str) or len(values) != n:
            raise ValueError(
                f"label set '{target}' must be a list with one label for each of the {n} pictures; got {_short(values)}"
            )
    return {str(t): [None if value is None else str(value) for value in values] for t, values in sets.items()}


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, (str, Path)) else f"a {type(value).__name__}"
    return f"{text} of {len(value)}" if isinstance(value, (list, tuple)) else text
