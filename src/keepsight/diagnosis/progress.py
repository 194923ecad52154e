"""The progress bar of a diagnosis."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def tracked(items: Iterable[Any], what: str, progress: bool, total: int | None = None) -> Iterable[Any]:
    """The items behind a progress bar with the time left."""
    if not progress:
        return items
    from rich.progress import track

    return track(items, description=what, total=total)
