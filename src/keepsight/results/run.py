"""A run's folder: its numbers, what made them, and a few pictures to look at.

rows.jsonl     one Measurement a line
run.json       kind ("diagnosis", "training"), label, command, versions, model, depth, PRe layer, prompt, seed, counts
config.yaml    the resolved configuration
examples/      pictures, masks, similarity maps and examples.json
report.html    written by keepsight.report
"""

import datetime
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from keepsight.results.maps import SimilarityMap
from keepsight.results.measurement import Measurement, read_rows, write_rows
from keepsight.results.provenance import command_line, prompt_hash, versions
from keepsight.results.storage import make_folder, storage_error, write_file

RUN_FILE = "run.json"
_OWN_FILES = ("rows.jsonl", "config.yaml", "report.html", "report.md")
_TRAINING = ("stages", "curves.jsonl", "model")  # what a training's folder holds beside them
_STAGE = ".keepsight-"  # start of the name of the folder that holds a run that is not whole yet


@dataclass(frozen=True)
class Example:
    """A picture of the diagnosed set. `mask` [H, W] uint8: 0 background, 255 ignore, other values objects."""

    image: Image.Image
    mask: np.ndarray | None = None
    name: str = ""  # file name or index in the data set
    caption: str = ""  # label, question, answer: whatever belongs to the picture
    map: SimilarityMap | None = None  # which of its patches look alike at each layer


@dataclass(frozen=True)
class LoadedRun:
    """A run in memory; what the report reads."""

    label: str
    rows: Sequence[Measurement]
    info: Mapping[str, Any] = field(default_factory=dict)  # the content of run.json
    config: str = ""  # YAML
    examples: Sequence[Example] = ()

    @property
    def seeds(self) -> list[int]:
        """The seeds behind the numbers: `seeds` of run.json, else those of the rows, else its `seed`."""
        listed = self.info.get("seeds")
        if not listed:
            listed = {row.seed for row in self.rows if row.seed is not None}
        if not listed and self.info.get("seed") is not None:
            listed = [self.info["seed"]]
        return sorted(listed)


class RunDirectory:
    """The folder of one run. Use `create` or `open`."""

    def __init__(self, path: Path, info: dict[str, Any]) -> None:
        self.path = path
        self.info = info

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        label: str,
        command: str | None = None,
        model: str = "",
        fingerprint: str = "",
        depth: int | None = None,
        width: int | None = None,
        pre_layer: int | None = None,
        prompt: str | None = None,
        seed: int | None = None,
        counts: Mapping[str, int] | None = None,
        targets: Mapping[str, str] | None = None,
        kind: str | None = None,
        overwrite: bool = False,
        **extra: Any,
    ) -> "RunDirectory":
        """Start a run in `path`, a folder that is new or empty, and write its run.json.

        What is written to the run later may fail; `staged` replaces a run whole or not at all.

        Args:
            command: what to type to get the run again; the running command unless given.
            counts: such as {"images": 400, "skipped images": 2}.
            targets: label set → "asked" or "never asked"; the report keeps the two apart.
            kind: what the run is: "diagnosis", "training". A run of one kind never replaces one of another.
            overwrite: replace a run that is already there. Only keepsight's own files are removed, and only from
                a folder that holds a run.
            extra: further JSON values for run.json.

        Raises:
            FileExistsError: if the folder holds a run and `overwrite` is off, a run of another kind, or something else.
            StorageError: if the folder cannot be written to.
        """
        path = Path(path)
        holds_run = _check_vacant(path, overwrite, kind)
        make_folder(path)
        info = {
            **({} if kind is None else {"kind": kind}),
            "label": label,
            "command": command_line() if command is None else command,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "model": {"name": model, "fingerprint": fingerprint},
            "depth": depth,
            "width": width,
            "pre_layer": pre_layer,
            "prompt": prompt,
            "prompt_sha256": None if prompt is None else prompt_hash(prompt),
            "seed": seed,
            "counts": dict(counts or {}),
            "targets": dict(targets or {}),
            **extra,
        }
        run = cls(path, info)
        run._write_info()  # first: where not even this can be written, nothing is removed
        if holds_run:
            run._remove_results()
        return run

    @classmethod
    @contextmanager
    def staged(
        cls, path: str | Path, *, label: str, kind: str | None = None, overwrite: bool = False, **known: Any
    ) -> Iterator["RunDirectory"]:
        """A run that appears in `path` when the block ends, whole or not at all.

        Everything that the block writes to the run goes to a hidden folder inside `path`, and is moved at the end. If
        anything fails, `path` is as it was: the old run whole, or no folder.

        Args: those of `create`.

        Raises:
            FileExistsError, StorageError: as `create`.
        """
        path = Path(path)
        _check_vacant(path, overwrite, kind)
        with _room(path) as stage:
            old = make_folder(stage / "old")
            run = cls.create(stage / "new", label=label, kind=kind, **known)
            yield run
            _swap(run.path, path, old)
            run.path = path

    @classmethod
    def check(cls, path: str | Path, *, kind: str | None = None, overwrite: bool = False) -> None:
        """Raise now what `create` or `staged` would raise after the work; leaves nothing behind.

        Raises:
            FileExistsError, StorageError: as `create`.
        """
        path = Path(path)
        _check_vacant(path, overwrite, kind)
        with _room(path) as stage:
            write_file(stage / RUN_FILE, "{}\n")

    @classmethod
    def open(cls, path: str | Path) -> "RunDirectory":
        """The run that `path` holds.

        Raises:
            FileNotFoundError: if `path` holds no run.
            ValueError: if its run.json cannot be read.
        """
        path = Path(path)
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
        return cls(path, info)

    @property
    def kind(self) -> str | None:
        """What run.json says the run is; one that does not say and holds what only a training leaves is that."""
        told = self.info.get("kind")
        if told is None and any((self.path / name).exists() for name in _TRAINING):
            return "training"
        return told

    @property
    def label(self) -> str:
        """The run's name in reports."""
        return self.info["label"]

    @property
    def rows_path(self) -> Path:
        return self.path / "rows.jsonl"

    def update(self, **fields: Any) -> None:
        """Add or replace values of run.json; `prompt` renews its hash.

        Raises:
            StorageError: if run.json cannot be written; the one that was there stays.
        """
        if fields.get("prompt") is not None:
            fields["prompt_sha256"] = prompt_hash(fields["prompt"])
        self.info = {**self.info, **fields}
        self._write_info()

    def write_rows(self, rows: Iterable[Measurement]) -> Path:
        """Write rows.jsonl in one step, in place of the one that was there."""
        return write_rows(self.rows_path, rows)

    def read_rows(self) -> list[Measurement]:
        """The run's rows; see `keepsight.results.read_rows` for the errors."""
        return read_rows(self.rows_path)

    def write_config(self, config: Any) -> Path:
        """Write the resolved configuration, a dataclass or a mapping, to config.yaml."""
        text = yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)
        return write_file(self.path / "config.yaml", text)

    def differences(self, config: Any) -> dict[str, tuple[Any, Any]]:
        """Where `config` is not the configuration that config.yaml holds: dotted name → (value there, value now)."""
        file = self.path / "config.yaml"
        there = _flat(yaml.safe_load(file.read_text(encoding="utf-8"))) if file.is_file() else {}
        now = _flat(_plain(config))
        names = dict.fromkeys([*there, *now])
        return {name: (there.get(name), now.get(name)) for name in names if there.get(name) != now.get(name)}

    def write_examples(self, examples: Iterable[Example]) -> None:
        """Write pictures, masks and maps to examples/, in place of those that were there."""
        folder = self.path / "examples"
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
        write_file(folder / "examples.json", _json(index))

    def read_examples(self) -> list[Example]:
        """The pictures of examples/, in order; an empty list if there are none."""
        folder = self.path / "examples"
        index = folder / "examples.json"
        if not index.is_file():
            return []
        found = []
        for entry in json.loads(index.read_text(encoding="utf-8")):
            mask = entry["mask"] and np.asarray(_open_png(folder, entry["mask"]), dtype=np.uint8)
            image = _open_png(folder, entry["image"]).convert("RGB")
            stored = entry.get("map") and SimilarityMap.from_bytes(_inside(folder, entry["map"]).read_bytes())
            found.append(
                Example(image, mask if entry["mask"] else None, entry["name"], entry["caption"], stored or None)
            )
        return found

    def load(self) -> LoadedRun:
        """The whole run in memory. A run without rows yet has none.

        Raises:
            ValueError: if a file of the run cannot be read.
        """
        config = self.path / "config.yaml"
        return LoadedRun(
            label=self.label,
            rows=self.read_rows() if self.rows_path.is_file() else [],
            info=self.info,
            config=config.read_text(encoding="utf-8") if config.is_file() else "",
            examples=self.read_examples(),
        )

    def _write_info(self) -> None:
        write_file(self.path / RUN_FILE, _json(self.info))

    def _remove_results(self) -> None:
        for name in _OWN_FILES:
            (self.path / name).unlink(missing_ok=True)
        if (self.path / "examples" / "examples.json").is_file():
            shutil.rmtree(self.path / "examples")


def _plain(config: Any) -> dict[str, Any]:
    plain = asdict(config) if is_dataclass(config) and not isinstance(config, type) else dict(config)
    # Through JSON, so that tuples, paths and enums become plain values that any YAML reader takes.
    return json.loads(json.dumps(plain, default=str))


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _check_vacant(path: Path, overwrite: bool, kind: str | None) -> bool:
    """Whether `path` holds a run that may be replaced; False where it is new or empty."""
    if (path / RUN_FILE).is_file():
        try:
            there = RunDirectory.open(path).kind
        except ValueError as cause:
            if overwrite:
                raise FileExistsError(f"'{path}' cannot be overwritten: {cause}. Choose another folder") from cause
            there = None
        if None not in (kind, there) and kind != there:
            raise FileExistsError(
                f"'{path}' holds a {there} run, which a {kind} must not replace, not even with overwrite=True "
                "(--overwrite). Choose another folder"
            )
        if not overwrite:
            raise FileExistsError(
                f"'{path}' already holds a run ('{RUN_FILE}' is there). Choose another folder, or pass "
                "overwrite=True (--overwrite) to replace it"
            )
        return True
    content = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    if content := [name for name in content if not name.startswith(_STAGE)]:
        listed = ", ".join(content[:3]) + (", …" if len(content) > 3 else "")
        raise FileExistsError(
            f"'{path}' is not empty and holds no keepsight run ({listed}). Choose a new or empty folder; "
            "overwriting never touches files that keepsight did not write"
        )
    return False


@contextmanager
def _room(path: Path) -> Iterator[Path]:
    """A hidden folder inside `path`, gone afterwards, as are the folders made for it that are empty then."""
    made = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    stage = path / f"{_STAGE}{secrets.token_hex(4)}"
    try:
        make_folder(path)
        yield make_folder(stage)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def _swap(new: Path, path: Path, old: Path) -> None:
    """Move a run's files from `path` to `old` and those of `new` to `path`; if one cannot be moved, all go back."""
    moves = [(path / name, old / name) for name in (RUN_FILE, *_OWN_FILES) if (path / name).is_file()]
    if (path / "examples" / "examples.json").is_file():
        moves.append((path / "examples", old / "examples"))
    moves += [(entry, path / entry.name) for entry in sorted(new.iterdir())]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            os.rename(source, target)
            done.append((source, target))
    except BaseException as cause:
        for source, target in reversed(done):
            os.rename(target, source)
        raise storage_error(moves[len(done)][1], cause) if isinstance(cause, OSError) else cause from cause


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
        index = folder / "examples.json"
        raise ValueError(f"'{index}' names '{name}', which is not a picture in that folder")
    return path


def _json(value: Any) -> str:
    try:
        return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except TypeError as error:
        raise TypeError(f"run.json takes plain values (text, numbers, lists, dictionaries): {error}") from error
