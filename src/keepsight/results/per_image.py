"""What each picture adds to each number of a run, so that two runs on the same pictures are compared in pairs.

For a mean it is the picture's own value. For any other statistic it is the value plus the picture's influence (the
linearised, or jackknife, pseudo-value): the numbers of all pictures average to the statistic, and their spread over the
square root of n is its standard error. The spread of the *differences* of two runs is then the standard error of the
difference, with what the two share taken out.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from keepsight.results.measurement import Key
from keepsight.results.storage import write_file

PER_IMAGE = ("per_image.npy", "per_image.json")


@dataclass(frozen=True)
class PerImage:
    """images: [n] names, in order; keys: [K] what the rows are of; values: [K, n] float32, NaN without a value."""

    images: Sequence[str]
    keys: Sequence[Key]
    values: np.ndarray

    @cached_property
    def _row(self) -> dict[Key, int]:
        return {key: number for number, key in enumerate(self.keys)}

    @cached_property
    def _column(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.images)}

    def __contains__(self, key: Key) -> bool:
        return key in self._row

    def of(self, key: Key) -> np.ndarray:
        """[n] float64, what each picture adds to the number that `key` names.

        Raises:
            KeyError: if it is not kept picture by picture.
        """
        return np.asarray(self.values[self._row[key]], dtype=np.float64)

    def renamed(self, target: Callable[[str], str]) -> PerImage:
        """The same with other targets."""
        return PerImage(self.images, [key._replace(target=target(key.target)) for key in self.keys], self.values)

    def together(self, other: PerImage) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the pictures that both hold, in this one and in the other, in this one's order."""
        shared = [(i, other._column[name]) for name, i in self._column.items() if name in other._column]
        mine, theirs = zip(*shared, strict=True) if shared else ((), ())
        return np.asarray(mine, dtype=np.int64), np.asarray(theirs, dtype=np.int64)


def merged(parts: Sequence[PerImage]) -> PerImage:
    """All numbers of several, over all their pictures; each key in one of them only."""
    images = list(dict.fromkeys(name for part in parts for name in part.images))
    place = {name: column for column, name in enumerate(images)}
    builder = PerImageBuilder(images)
    for part in parts:
        where = np.array([place[name] for name in part.images], dtype=np.int64)
        for key in part.keys:
            builder.add(key, part.of(key), where)
    return builder.finish()


class PerImageBuilder:
    """Collects the rows in a file without a name, so that memory does not grow with pictures × numbers.

    Args:
        images: [n] names of the pictures, in the order of the values.
    """

    def __init__(self, images: Sequence[str]) -> None:
        self._images = tuple(images)
        self._keys: list[Key] = []
        self._file = tempfile.TemporaryFile(prefix="keepsight-")  # noqa: SIM115 - it lives as long as its map

    def add(self, key: Key, values: np.ndarray, where: np.ndarray | None = None) -> None:
        """The values of the pictures, or of those at the positions `where`.

        Raises:
            ValueError: there are not as many values as pictures.
        """
        row = np.full(len(self._images), np.nan, dtype=np.float32)
        if where is None and len(values) != len(row):
            raise ValueError(f"{key} has {len(values)} values; there are {len(row)} pictures")
        row[slice(None) if where is None else where] = values
        self._file.write(row.tobytes())
        self._keys.append(key)

    def finish(self) -> PerImage:
        """What was collected."""
        self._file.flush()
        shape = (len(self._keys), len(self._images))
        values = np.memmap(self._file, dtype=np.float32, mode="r", shape=shape) if all(shape) else np.empty(shape)
        return PerImage(self._images, tuple(self._keys), values)


def write_per_image(folder: Path, values: PerImage) -> None:
    """Write the two files, each whole or not at all.

    Raises:
        StorageError: if the disk is full or the folder may not be written to.
    """
    content = io.BytesIO()
    np.save(content, np.asarray(values.values, dtype=np.float32), allow_pickle=False)
    write_file(folder / PER_IMAGE[0], content.getvalue())
    write_file(folder / PER_IMAGE[1], json.dumps({"images": list(values.images), "keys": values.keys}))


def read_per_image(folder: Path) -> PerImage | None:
    """What `write_per_image` wrote, mapped from the disk; None where a run has none.

    Raises:
        ValueError: if the files are damaged or do not fit one another.
    """
    numbers, index = (folder / name for name in PER_IMAGE)
    if not index.is_file() or not numbers.is_file():
        return None
    try:
        told = json.loads(index.read_text(encoding="utf-8"))
        found = PerImage(told["images"], [Key(*key) for key in told["keys"]], np.load(numbers, mmap_mode="r"))
        if found.values.shape != (len(found.keys), len(found.images)):
            raise ValueError(f"{found.values.shape} values for {len(found.keys)} numbers of {len(found.images)}")
    except (ValueError, TypeError, KeyError, EOFError) as error:
        raise ValueError(
            f"'{numbers}' and '{index.name}' cannot be read ({error}); they were cut off or edited. Remove both, and "
            "the run is compared as one on other pictures, or diagnose again"
        ) from error
    return found
