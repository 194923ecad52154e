"""Opening training pictures: inside their folder only, turned upright, in RGB, whole or named as broken."""

import io
import os
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageOps


class ImageError(ValueError):
    """A picture that cannot be used: missing, truncated, not a picture, or outside its folder."""


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def resolve_image(reference: str, folder: str | Path | None) -> Path:
    """The file that `reference` names inside `folder`, symbolic links followed.

    Cheap enough to run over every entry before training: folders are resolved once each.

    Raises:
        ImageError: for a URL, a path that leaves the folder, or a file that is not there.
    """
    if "://" in reference or reference.startswith("data:"):
        raise ImageError(
            f"image '{reference[:80]}' is a URL; only files inside the image folder are read. "
            "Download it and give its path relative to the image folder."
        )
    if folder is None:
        raise ImageError(f"image '{reference}' is a path, but no image folder was given; set `image_folder`.")
    root = _real_folder(os.fspath(folder))
    parent, name = os.path.split(os.path.join(root, reference))
    path = os.path.join(_real_folder(parent), name)
    if os.path.islink(path) or name in ("", ".", ".."):
        path = os.path.realpath(path)
    if os.path.commonpath([root, path]) != root:
        raise ImageError(
            f"image '{reference}' leaves the image folder '{folder}' (it resolves to '{path}'); "
            "allowed are files inside the folder, also through symbolic links. Move or copy the picture into it."
        )
    if not os.path.isfile(path):
        raise ImageError(f"image '{reference}' is missing: there is no file '{path}'.")
    return Path(path)


def open_image(source: Path | bytes | Image.Image, name: str) -> Image.Image:
    """Decode a picture fully, turn it as its EXIF orientation says, and convert it to RGB.

    Args:
        source: a file, the bytes of a file, or a decoded picture.
        name: what to call it in an error.

    Raises:
        ImageError: if it is missing, truncated, or no picture at all.
    """
    try:
        if isinstance(source, Image.Image):
            return ImageOps.exif_transpose(source).convert("RGB")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as cause:
        raise ImageError(
            f"image '{name}' cannot be read ({type(cause).__name__}: {cause}); it may be truncated or no picture. "
            "Repair or remove it."
        ) from cause
