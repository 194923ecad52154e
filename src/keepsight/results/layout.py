"""What lies in the folder of a run, and what may be replaced there."""

import json
from pathlib import Path
from typing import Any

from keepsight.results.answers import ANSWERS
from keepsight.results.examples import INDEX
from keepsight.results.per_image import PER_IMAGE
from keepsight.results.points import POINTS
from keepsight.results.staging import entries, move
from keepsight.results.thumbnails import THUMBNAILS

RUN_FILE = "run.json"
EXAMPLES = "examples"
RESUMED = ("training", "evaluation", "attribution")  # kinds whose commands go on with a run, and replace none
_OWN_FILES = ("rows.jsonl", "config.yaml", "report.html", "report.md", *PER_IMAGE, ANSWERS, THUMBNAILS, POINTS)
_TRAINING = ("stages", "curves.jsonl", "model", "adapter")  # what a training's folder holds beside them


def read_info(path: Path) -> dict[str, Any]:
    """The run.json of the run that `path` holds.

    Raises:
        FileNotFoundError: if `path` holds no run.
        ValueError: if its run.json cannot be read.
    """
    file = path / RUN_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"'{path}' holds no run: '{RUN_FILE}' is missing. Give a folder that `keepsight diagnose` or "
            "`keepsight train` wrote"
        )
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"'{file}' is not JSON ({error}); it was edited or cut off, run again") from error
    if not isinstance(info, dict) or not isinstance(info.get("label"), str):
        raise ValueError(f"'{file}' has no 'label'; it was edited or is not a keepsight run")
    return info


def kind_of(path: Path, info: dict[str, Any]) -> str | None:
    """What run.json says the run is; one that does not say and holds what only a training leaves is that."""
    told = info.get("kind")
    if told is None and any((path / name).exists() for name in _TRAINING):
        return "training"
    return told


def own_entries(path: Path) -> list[Path]:
    """The files and folders in `path` that keepsight wrote there, run.json apart."""
    found = [path / name for name in _OWN_FILES if (path / name).is_file()]
    return [*found, path / EXAMPLES] if (path / EXAMPLES / INDEX).is_file() else found


def check_vacant(path: Path, overwrite: bool, kind: str | None) -> bool:
    """Whether `path` holds a run that may be replaced; False where it is new or empty.

    Raises:
        FileExistsError: it holds a run that may not, or files that are no run's.
    """
    if (path / RUN_FILE).is_file():
        try:
            there = kind_of(path, read_info(path))
        except ValueError as cause:
            if overwrite:
                raise FileExistsError(f"'{path}' cannot be overwritten: {cause}. Choose another folder") from cause
            there = None
        if None not in (kind, there) and kind != there:
            even = "" if kind in RESUMED else ", not even with overwrite=True (--overwrite)"
            raise FileExistsError(
                f"'{path}' holds a {there} run, which {_a(kind)} must not replace{even}. Choose another folder"
            )
        if not overwrite:
            otherwise = (
                "go on with it by resume=True (--resume)"
                if kind in RESUMED
                else "pass overwrite=True (--overwrite) to replace it"
            )
            raise FileExistsError(
                f"'{path}' already holds a run ('{RUN_FILE}' is there). Choose another folder, or {otherwise}"
            )
        return True
    if content := entries(path):
        listed = ", ".join(content[:3]) + (", …" if len(content) > 3 else "")
        raise FileExistsError(
            f"'{path}' is not empty and holds no keepsight run ({listed}). Choose a new or empty folder; "
            "overwriting never touches files that keepsight did not write"
        )
    return False


def _a(kind: str | None) -> str:
    return f"{'an' if str(kind).startswith(('a', 'e')) else 'a'} {kind}"


def swap(new: Path, path: Path, old: Path) -> None:
    """Move a run's files from `path` to `old` and those of `new` to `path`; if one cannot be moved, all go back."""
    info = [path / RUN_FILE] if (path / RUN_FILE).is_file() else []
    moves = [(entry, old / entry.name) for entry in (*info, *own_entries(path))]
    move(moves + [(entry, path / entry.name) for entry in sorted(new.iterdir())])
