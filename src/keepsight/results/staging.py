"""Folders that fill whole or not at all: everything is made in a hidden folder beside its place, then moved."""

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from keepsight.results.storage import HALF, make_folder, storage_error

STAGE = ".keepsight-"  # start of the name of a folder that holds what is not whole yet


def entries(path: Path) -> list[str]:
    """What a folder holds, stages and what a killed process left of a file aside; nothing where there is no folder."""
    content = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    return [name for name in content if not name.startswith(STAGE) and not HALF.fullmatch(name)]


@contextmanager
def room(path: Path) -> Iterator[Path]:
    """A hidden folder inside `path`, gone afterwards, as are the folders made for it that are empty then."""
    made = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    stage = path / f"{STAGE}{secrets.token_hex(4)}"
    try:
        make_folder(path)
        yield make_folder(stage)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def move(moves: Sequence[tuple[Path, Path]]) -> None:
    """Rename each source to its target, in order; if one cannot be moved, all go back.

    Raises:
        StorageError: naming the target that could not be written.
    """
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            os.rename(source, target)
            done.append((source, target))
    except BaseException as cause:
        for source, target in reversed(done):
            os.rename(target, source)
        raise storage_error(moves[len(done)][1], cause) if isinstance(cause, OSError) else cause from cause


@contextmanager
def staged_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write to, whose content appears in `path` when the block ends; if anything fails, nothing does.

    Raises:
        FileExistsError: if `path` is a folder that holds something.
        StorageError: if it cannot be written to.
    """
    path = Path(path)
    if there := entries(path):
        listed = ", ".join(there[:3]) + (", …" if len(there) > 3 else "")
        raise FileExistsError(f"'{path}' is not empty ({listed}). Choose a new or empty folder")
    with room(path) as stage:
        yield stage
        move([(entry, path / entry.name) for entry in sorted(stage.iterdir())])
