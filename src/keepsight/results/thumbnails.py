"""Small copies of the pictures that questions are about, in one file of a run, for pages that show answers."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from keepsight.results.storage import write_file

THUMBNAILS = "thumbnails.zip"
LONGEST_SIDE = 240  # pixels
MOST = 5000  # pictures; what the nine benchmarks hold at most, about 50 MB
_PHOTO = 128 * 128  # pictures above this many pixels are stored as JPEG


def encode(image: Image.Image) -> tuple[str, bytes]:
    """ "png" for a small picture, which loses nothing, else "jpeg"; and the file's bytes."""
    kind = "png" if image.width * image.height <= _PHOTO else "jpeg"
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **({"quality": 88} if kind == "jpeg" else {}))
    return kind, buffer.getvalue()


def shrink(image: Image.Image, longest: int) -> Image.Image:
    """The picture, its longer side at most `longest` pixels."""
    scale = min(1.0, longest / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image if scale == 1 else image.resize(size, Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class Thumbnails:
    """The pictures of a run, by task and name; opened when they are asked for."""

    path: Path

    def get(self, task: str, name: str) -> Image.Image | None:
        """One picture, or None where it was not kept.

        Raises:
            ValueError: if the file, or the picture, is damaged.
        """
        try:
            with zipfile.ZipFile(self.path) as file:
                if _member(task, name) not in file.namelist():
                    return None
                with Image.open(io.BytesIO(file.read(_member(task, name)))) as image:
                    return image.convert("RGB")
        except (zipfile.BadZipFile, OSError, SyntaxError, Image.DecompressionBombError) as cause:
            raise ValueError(
                f"'{self.path}' cannot be read ({cause}); it was cut off or edited. Remove it, and pages are written "
                "without its pictures"
            ) from cause


def write_thumbnails(folder: Path, pictures: Iterable[tuple[str, str, Image.Image]]) -> int:
    """Keep small copies of pictures, (task, name, RGB picture) each, in one file; the first `MOST` of them.

    Returns:
        How many were kept.

    Raises:
        StorageError: if the disk is full or the folder may not be written to.
    """
    content, kept = io.BytesIO(), 0
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as file:
        for task, name, image in pictures:
            file.writestr(zipfile.ZipInfo(_member(task, name)), encode(shrink(image, LONGEST_SIDE))[1])
            kept += 1
            if kept == MOST:
                break
    write_file(folder / THUMBNAILS, content.getvalue())
    return kept


def read_thumbnails(folder: Path) -> Thumbnails | None:
    """What `write_thumbnails` wrote; None where a run has none."""
    return Thumbnails(folder / THUMBNAILS) if (folder / THUMBNAILS).is_file() else None


def _member(task: str, name: str) -> str:
    """A name without anything that came from a question file, so that it can lead nowhere."""
    return hashlib.sha256(f"{task}\0{name}".encode()).hexdigest()[:32]
