"""Memory that is free goes back to the system."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def give_back() -> None:
    """Let the C library (glibc) return what is free.

    It keeps freed blocks in holes between those in use. Over thousands of batches these add up to much more than a
    diagnosis ever has in use at once. Elsewhere, and where there is nothing to return, this does nothing.
    """
    if trim := _trim():
        trim(0)


@cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return None
