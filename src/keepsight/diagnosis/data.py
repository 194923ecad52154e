"""Pictures with labels and object masks: from a folder, a list or a Hugging Face dataset, in a fixed order."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from keepsight.diagnosis.masks import components, read_mask
from keepsight.images import ImageError, inside, open_image, refuse_url

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
LABEL_COLUMNS = ("label", "labels", "class")  # of a dataset, where they hold text
LOCAL_BUILDERS = ("imagefolder", "generator")  # of datasets: only these take paths from the user's own disk


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
        image = open_image(self.source() if callable(self.source) else self.source, self.name)
        given = self.mask() if callable(self.mask) else self.mask
        if given is None:
            return image, None
        mask = read_mask(given, self.name)
        if mask.shape != (image.height, image.width):
            raise ValueError(
                f"the mask of '{self.name}' is {mask.shape[1]} × {mask.shape[0]} pixels, its picture "
                f"{image.width} × {image.height}; a mask has the size of its picture as viewers show it, "
                "its EXIF orientation applied"
            )
        return image, components(mask) if split_components else mask


@dataclass(frozen=True)
class Pictures:
    """Pictures in a fixed order, and label sets: {target: one label (or None) per picture}."""

    items: Sequence[Picture]
    labels: Mapping[str, Sequence[str | None]]
    unlabelled: str = "no labels were given"  # why there are no label sets, where there are none

    def __len__(self) -> int:
        return len(self.items)


def find_pictures(images: Any, labels: Any = None, masks: Any = None) -> Pictures:
    """Pictures from what a user has.

    Args:
        images: a folder (a class per subfolder, or flat), a list of paths or PIL images, or a Hugging Face dataset
            with an image column.
        labels: None (the subfolders, or the dataset's ClassLabel columns and its text columns named label, labels or
            class), one label per picture, or {target: labels}.
        masks: None, a folder with `<stem>.png` for a picture of that stem (subfolders mirrored for a folder of
            pictures), one array or None per picture, or the name of a dataset's column.

    Raises:
        ValueError: nothing found, an ambiguous folder, a path that leaves the folder, a URL, or lists of other lengths.
        FileNotFoundError: a folder that does not exist.
    """
    unlabelled = "no labels were given"
    _refuse_single(images)
    if isinstance(images, (str, Path)):
        root = _folder(images, "image folder")
        relative, found = _walk(root)
        unlabelled = "no labels: pictures in one flat folder have no classes"
        sources: list[Any] = [root / path for path in relative]
        names = [path.as_posix() for path in relative]
    elif hasattr(images, "column_names") and hasattr(images, "features"):
        if len(images) == 0:
            raise ValueError("the dataset is empty: it has no rows, and so no pictures")
        sources, found = _dataset(images)
        unlabelled = (
            f"no labels: none of the dataset's columns ({', '.join(images.column_names)}) is a ClassLabel, or holds "
            f"text and is named {' or '.join(LABEL_COLUMNS)}"
        )
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
    return Pictures(items, _labels(labels, len(items)) if labels is not None else found, unlabelled)


def _refuse_single(images: Any) -> None:
    many = isinstance(images, (str, Path)) or hasattr(images, "__iter__") or hasattr(images, "__getitem__")
    if isinstance(images, Image.Image) or not many:
        raise ValueError(
            f"images is {'one picture' if isinstance(images, Image.Image) else _short(images)}; give a folder, a list "
            "of paths or PIL images, or a Hugging Face dataset"
        )


def _folder(path: str | Path, what: str) -> Path:
    refuse_url(str(path))
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"{what} '{path}' does not exist or is no folder; check the path")
    return root.resolve()


def _walk(root: Path) -> tuple[list[Path], dict[str, list[str | None]]]:
    paths = sorted(path.relative_to(root) for path in _files(root, root, (os.path.realpath(root),)))
    for path in paths:
        inside(path, root)
    nested = [len(path.parts) > 1 for path in paths]
    if any(nested) and not all(nested):
        raise ValueError(
            f"'{root}' holds pictures directly (such as '{paths[nested.index(False)]}') and in subfolders ("
            f"'{paths[nested.index(True)]}'); expected one subfolder per class, or none"
        )
    return paths, {"class": [path.parts[0] for path in paths]} if any(nested) else {}


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
        elif path.suffix.lower() in SUFFIXES:
            yield path


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
        target = "class" if name == "label" else name
        if kind == "ClassLabel":
            # An unlabelled row is -1 in datasets.
            found[target] = [
                dataset.features[name].int2str(value) if value is not None and value >= 0 else None
                for value in dataset[name]
            ]
        elif name in LABEL_COLUMNS and getattr(dataset.features[name], "dtype", "") in ("string", "large_string"):
            found.setdefault(target, list(dataset[name]))
    return _cells(dataset, column), found


def _cells(dataset: Any, column: str) -> list[Any]:
    """A function for each row that gives the column's value: of pictures the file's bytes or path, undecoded.

    Left to itself the library decodes a row when it is read, and downloads the URL or opens the path that it names.
    """
    from datasets import Image as ImageFeature

    cells = dataset.select_columns([column])
    if not isinstance(dataset.features[column], ImageFeature):
        return [partial(_value, cells, column, i) for i in range(len(cells))]
    cells, folders = cells.cast_column(column, ImageFeature(decode=False)), _folders(dataset)
    return [partial(_file, cells, column, i, folders) for i in range(len(cells))]


def _folders(dataset: Any) -> list[Path] | None:
    """Where the files may lie that rows name: the folder of a saved dataset; anywhere (None) if the user named them.

    Rows that came with a download name whatever their author liked.
    """
    kept = [Path(file["filename"]) for file in dataset.cache_files]
    # Anywhere above: state.json says where its files lie, and a data set may say that it is an image folder.
    saved = [folder for file in kept for folder in file.parents if (folder / "state.json").is_file()]
    made_by = dataset.info.builder_name
    if not saved and (made_by in LOCAL_BUILDERS or (made_by is None and not kept)):
        return None
    return saved


def _value(cells: Any, column: str, index: int) -> Any:
    return cells[index][column]


def _file(cells: Any, column: str, index: int, folders: list[Path] | None) -> Any:
    cell = cells[index][column]
    if cell is None or (cell["bytes"] is None and not cell["path"]):
        raise ImageError(f"row {index} of the dataset has no picture in '{column}'")
    if cell["bytes"] is not None:
        return cell["bytes"]
    refuse_url(cell["path"])
    path = Path(cell["path"])
    real = path.resolve()
    if folders is not None and not any(real.is_relative_to(folder.resolve()) for folder in folders):
        raise ImageError(
            f"row {index} of the dataset names the file '{path}' in '{column}', which the dataset does not hold; it "
            "could be any file of this machine. Give a dataset that holds the pictures' bytes, or a list of paths"
        )
    return path


def _mask_cell(cell: Any, index: int) -> Any:
    return cell() if cell.args[0][index][cell.args[1]] is not None else None


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
        kind = type(images.features[masks]).__name__
        if kind not in ("Image", "Array2D", "List"):
            raise ValueError(f"the mask column '{masks}' is a {kind}; cast it to datasets.Image, or give arrays")
        return [partial(_mask_cell, cell, i) for i, cell in enumerate(_cells(images, masks))]
    if isinstance(masks, (str, Path)):
        root = _folder(masks, "mask folder")
        base = Path(images).resolve() if isinstance(images, (str, Path)) else None
        tried = [Path(name if base is not None else Path(name).name).with_suffix(".png") for name in names]
        found: list[Any] = []
        owners: dict[Path, str] = {}
        for name, path in zip(names, tried, strict=True):
            if (root / path).is_file():
                inside(path, root, "mask")
                if owners.setdefault(path, name) != name:
                    raise ValueError(
                        f"the mask '{root / path}' would be that of '{owners[path]}' and of '{name}'; rename one, "
                        "give a folder of pictures, whose subfolders the masks mirror, or give the masks as a list"
                    )
                found.append(root / path)
            else:
                found.append(None)
        if not any(found):
            raise ValueError(
                f"mask folder '{masks}' has no mask for any of the {len(names)} pictures; expected "
                f"'{root / tried[0]}' for '{names[0]}'"
            )
        return found
    if len(masks) != len(names):
        raise ValueError(f"{len(masks)} masks for {len(names)} pictures; give one (or None) for each")
    return list(masks)


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, (str, Path)) else f"a {type(value).__name__}"
    return f"{text} of {len(value)}" if isinstance(value, (list, tuple)) else text
