"""Which file, column or array is the mask of which picture."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from keepsight.diagnosis.data.dataset_rows import cells_of, mask_cell
from keepsight.diagnosis.data.mask_formats import FORMATS
from keepsight.images import inside, refuse_url


def folder(path: str | Path, what: str) -> Path:
    """The folder, links followed.

    Raises:
        ImageError: for a URL. FileNotFoundError: if there is no such folder.
    """
    refuse_url(str(path))
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"{what} '{path}' does not exist or is no folder; check the path")
    return root.resolve()


def among_pictures(images: Any, masks: Any, suffix: str | None) -> str:
    """What the names of masks end in that lie in the folder of pictures; "" where they lie elsewhere.

    Data sets such as ADE20K keep both in one folder: its PNGs are masks, unless a suffix says which are.
    """
    both = isinstance(images, (str, Path)) and isinstance(masks, (str, Path))
    return (suffix or ".png") if both and Path(images).resolve() == Path(masks).resolve() else ""


def find_masks(masks: Any, names: Sequence[str], images: Any, format: str, suffix: str | None) -> list[Any]:
    """A mask's source, or None, for each picture; see `find_pictures`.

    In a folder the mask of `<stem>.jpg` is `<stem><suffix>`. Without a suffix it is the first of the format's own that
    any picture has; all masks then end in it.

    Raises:
        ValueError: no picture has a mask, two would share one, or a list of another length.
    """
    if masks is None:
        return [None] * len(names)
    if isinstance(masks, str) and masks in getattr(images, "column_names", ()):
        kind = type(images.features[masks]).__name__
        if kind not in ("Image", "Array2D", "List"):
            raise ValueError(f"the mask column '{masks}' is a {kind}; cast it to datasets.Image, or give arrays")
        return [partial(mask_cell, cell, i) for i, cell in enumerate(cells_of(images, masks))]
    if isinstance(masks, (str, Path)):
        return _in_folder(masks, names, isinstance(images, (str, Path)), format, suffix)
    if len(masks) != len(names):
        raise ValueError(f"{len(masks)} masks for {len(names)} pictures; give one (or None) for each")
    return list(masks)


def _in_folder(masks: str | Path, names: Sequence[str], mirrored: bool, format: str, suffix: str | None) -> list[Any]:
    root = folder(masks, "mask folder")
    pictures = [Path(name if mirrored else Path(name).name) for name in names]
    suffixes = FORMATS[format] if suffix is None else (suffix,)
    for ending in suffixes:
        tried = [path.with_name(path.stem + ending) for path in pictures]
        there = [(root / path).is_file() for path in tried]
        if any(there):
            break
    else:
        raise ValueError(
            f"mask folder '{masks}' has no mask for any of the {len(names)} pictures; expected "
            f"'{root / tried[0]}' for '{names[0]}'{_hint(root, pictures, suffixes)}"
        )
    found: list[Any] = []
    owners: dict[Path, str] = {}
    for name, path, exists in zip(names, tried, there, strict=True):
        if exists:
            inside(path, root, "mask")
            if owners.setdefault(path, name) != name:
                raise ValueError(
                    f"the mask '{root / path}' would be that of '{owners[path]}' and of '{name}'; rename one, "
                    "give a folder of pictures, whose subfolders the masks mirror, or give the masks as a list"
                )
        found.append(root / path if exists else None)
    return found


def _hint(root: Path, pictures: Sequence[Path], tried: Sequence[str]) -> str:
    """What is there instead, where a format of another name has its masks."""
    for format, endings in FORMATS.items():
        for ending in endings:
            there = (root / path.with_name(path.stem + ending) for path in pictures)
            if ending not in tried and (found := next((path for path in there if path.is_file()), None)):
                return f". There is '{found.name}': give mask_format='{format}' (--mask-format {format})"
    return "; masks that end otherwise need mask_suffix (--mask-suffix _mask.png)"
