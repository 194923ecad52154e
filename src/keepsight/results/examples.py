"""A few of a run's pictures with their masks, kept in its folder for the report."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from keepsight.results.maps import SimilarityMap
from keepsight.results.storage import make_folder, storage_error, to_json, write_file

INDEX = "examples.json"


@dataclass(frozen=True)
class Example:
    """A picture of the diagnosed set. `mask` [H, W] uint8: 0 background, 255 ignore, other values objects."""

    image: Image.Image
    mask: np.ndarray | None = None
    name: str = ""  # file name or index in the data set
    caption: str = ""  # label, question, answer: whatever belongs to the picture
    map: SimilarityMap | None = None  # which of its patches look alike at each layer


def write_examples(folder: Path, examples: Iterable[Example]) -> None:
    """Write pictures, masks and maps to `folder`, in place of those that were there."""
    if folder.exists():
        shutil.rmtree(folder)
    make_folder(folder)
    index = []
    for number, example in enumerate(examples):
        entry = {"image": f"{number:03d}.png", "mask": None, "name": example.name, "caption": example.caption}
        _save_png(example.image.convert("RGB"), folder / str(entry["image"]))
        if example.mask is not None:
            entry["mask"] = f"{number:03d}.mask.png"
            _save_png(Image.fromarray(np.asarray(example.mask, dtype=np.uint8)), folder / str(entry["mask"]))
        if example.map is not None:
            entry["map"] = f"{number:03d}.map.npz"
            write_file(folder / str(entry["map"]), example.map.to_bytes())
        index.append(entry)
    write_file(folder / INDEX, to_json(index))


def read_examples(folder: Path) -> list[Example]:
    """The pictures of `folder`, in order; an empty list if there are none."""
    index = folder / INDEX
    if not index.is_file():
        return []
    found = []
    for entry in json.loads(index.read_text(encoding="utf-8")):
        mask = entry["mask"] and np.asarray(_open_png(folder, entry["mask"]), dtype=np.uint8)
        image = _open_png(folder, entry["image"]).convert("RGB")
        stored = SimilarityMap.from_bytes(_inside(folder, entry["map"]).read_bytes()) if entry.get("map") else None
        found.append(Example(image, mask if entry["mask"] else None, entry["name"], entry["caption"], stored))
    return found


def _save_png(image: Image.Image, path: Path) -> None:
    try:
        image.save(path, format="PNG")
    except OSError as cause:
        path.unlink(missing_ok=True)
        raise storage_error(path, cause) from cause


def _open_png(folder: Path, name: str) -> Image.Image:
    with Image.open(_inside(folder, name)) as image:
        return image.copy()


def _inside(folder: Path, name: str) -> Path:
    """A file of examples/; a name that leads out of the folder is refused."""
    path = (folder / name).resolve()
    if path.parent != folder.resolve() or not path.is_file():
        raise ValueError(f"'{folder / INDEX}' names '{name}', which is not a picture in that folder")
    return path
