"""Pictures from files: inside their folder only, turned upright, in RGB, whole or named as broken."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps

_FRAMES = "keepsight: more frames than one"  # in a picture's info
SKIP = "Repair or remove it, or pass skip_broken=True (--skip-broken) to leave such pictures out."


class ImageError(ValueError):
    """A picture that cannot be used: missing, truncated, not a picture, a URL, or outside its folder."""


def refused(image: Image.Image, name: str, cause: Exception) -> ImageError:
    """What to raise where a model's processor does not take a picture."""
    return ImageError(
        f"image '{name}' of {image.width} × {image.height} pixels is refused by the model's processor "
        f"({type(cause).__name__}: {cause}). {SKIP}"
    )


def refuse_url(reference: str) -> None:
    """Nothing is ever downloaded because a data set or a list names it.

    Raises:
        ImageError: for a URL.
    """
    if "://" in reference or reference.startswith("data:"):
        raise ImageError(
            f"image '{reference[:80]}' is a URL; pictures are read from local files only. "
            "Download it and give its path."
        )


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def inside(reference: str | Path, folder: str | Path, what: str = "image") -> Path:
    """The path that `reference` means in `folder`, symbolic links followed; there need not be a file.

    Cheap enough to run over every entry of a data set: folders are resolved once each.

    Args:
        what: what to call the file in an error.

    Raises:
        ImageError: for a path that leaves the folder, or is none.
    """
    root = _real_folder(os.fspath(folder))
    parent, name = os.path.split(os.path.join(root, reference))
    try:
        path = os.path.join(_real_folder(parent), name)
        if os.path.islink(path) or name in ("", ".", ".."):
            path = os.path.realpath(path)
    except ValueError as cause:  # a zero byte, half a character
        raise ImageError(f"{what} {str(reference)!r} can be no file's path ({cause}). Correct it.") from cause
    if os.path.commonpath([root, path]) != root:
        raise ImageError(
            f"{what} '{reference}' leaves the {what} folder '{folder}' (it resolves to '{path}'); "
            "allowed are files inside the folder, also through symbolic links. Move or copy it into the folder."
        )
    return Path(path)


def resolve_image(reference: str, folder: str | Path | None) -> Path:
    """The file that `reference` names inside `folder`, symbolic links followed.

    Raises:
        ImageError: for a URL, a path that leaves the folder, or a file that is not there.
    """
    refuse_url(reference)
    if folder is None:
        raise ImageError(f"image '{reference}' is a path, but no image folder was given; set `image_folder`.")
    path = inside(reference, folder)
    if not path.is_file():
        raise ImageError(f"image '{reference}' is missing: there is no file '{path}'.")
    return path


@contextmanager
def _whole_only() -> Iterator[None]:
    """Let Pillow refuse half a picture, also where another package (lmms-eval) told it to fill the rest with grey."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def decode(
    source: Any, what: str, finish: Callable[[Image.Image], Image.Image] = Image.Image.copy, advice: str = SKIP
) -> Image.Image:
    """Decode a picture fully.

    Args:
        source: a file, the bytes of a file, a decoded picture, or a function that returns one of them.
        what: what to call it in an error.
        finish: what to do with the decoded picture before its file is closed.
        advice: what an error tells the reader to do.

    Raises:
        ImageError: if it is missing, truncated, or no picture at all.
    """
    try:
        if callable(source):
            source = source()
        if source is None:
            raise ValueError("there is no picture: the entry is null")
        with _whole_only():
            if isinstance(source, Image.Image):
                return finish(source)  # which may load it only now
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                return finish(image)
    except Image.DecompressionBombError as cause:
        raise ImageError(
            f"{what} is too large to be decoded ({cause}); allowed are {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels, "
            f"twice PIL.Image.MAX_IMAGE_PIXELS. Scale it down, or raise that limit if you trust the file. {advice}"
        ) from cause
    except (OSError, SyntaxError, ValueError, EOFError) as cause:
        raise ImageError(
            f"{what} cannot be read ({type(cause).__name__}: {cause}); it may be truncated or no picture. {advice}"
        ) from cause


def open_image(source: Any, name: str, advice: str = SKIP) -> Image.Image:
    """`decode`, then turn the picture as its EXIF orientation says, and convert it to RGB.

    Args:
        source: a file, the bytes of a file, a decoded picture, or a function that returns one of them.
        name: what to call it in an error.
        advice: what an error tells the reader to do.

    Raises:
        ImageError: if it is missing, truncated, or no picture at all.
    """
    return decode(source, f"image '{name}'", _upright_rgb, advice)


def is_animated(image: Image.Image) -> bool:
    """Whether `open_image` took the first of several frames or pages."""
    return bool(image.info.get(_FRAMES))


def _upright_rgb(image: Image.Image) -> Image.Image:
    # Cameras put a preview or a depth map into the same file (MPO); that is one picture.
    frames = getattr(image, "is_animated", False) and image.format != "MPO"
    found = _still_rgb(image)
    found.info[_FRAMES] = frames
    return found


def _still_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # more than 8 bits a pixel, which `convert` would clip to white
        values = np.asarray(image).astype(np.int64)
        low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
        if low < 0 or high > 65535:
            raise ValueError(f"grey values from {low} to {high}; expected 0 to 255 or 0 to 65535")
        narrow = image.mode == "I" and high <= 255
        image = Image.fromarray((values if narrow else np.round(values / 257)).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("grey values are floating-point numbers, whose range is not known; save it with 8 or 16 bits")
    return image.convert("RGB")
