"""Rows of a Hugging Face dataset: pictures, labels and masks; nothing is decoded, downloaded or opened unasked."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from keepsight.images import ImageError, refuse_url

LABEL_COLUMNS = ("label", "labels", "class")  # of a dataset, where they hold text
LOCAL_BUILDERS = ("imagefolder", "generator")  # of datasets: only these take paths from the user's own disk


def dataset_columns(dataset: Any) -> tuple[list[Any], dict[str, list[str | None]]]:
    """A source for each row's picture, and the label sets that the columns hold.

    Raises:
        ValueError: no column holds pictures.
    """
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
    return cells_of(dataset, column), found


def cells_of(dataset: Any, column: str) -> list[Any]:
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


def mask_cell(cell: Any, index: int) -> Any:
    return cell() if cell.args[0][index][cell.args[1]] is not None else None
