"""A run's folder: its numbers, what made them, and a few pictures to look at.

rows.jsonl     one Measurement a line
run.json       kind ("diagnosis", "training", "evaluation" or "attribution"), label, command, versions, model, depth,
               PRe layer, prompt, seed, counts
config.yaml    the resolved configuration
per_image.npy  what each picture adds to each number, and per_image.json, of what; for paired comparisons
examples/      pictures, masks, similarity maps and examples.json
answers.jsonl  one `AnswerRecord` a line: what was asked and answered; thumbnails.zip, the pictures that it is about
points.jsonl   of an attribution: skill, and what the layers tell, of every point of its trainings
report.html    written by keepsight.report
"""

import datetime
import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from keepsight.results.answers import AnswerRecord, read_answers, write_answers
from keepsight.results.examples import Example, read_examples, write_examples
from keepsight.results.layout import EXAMPLES, RUN_FILE, check_vacant, kind_of, own_entries, read_info, swap
from keepsight.results.loaded import LoadedRun
from keepsight.results.measurement import Measurement, read_rows, write_rows
from keepsight.results.per_image import PerImage, read_per_image, write_per_image
from keepsight.results.points import Point, read_points, write_points
from keepsight.results.provenance import command_line, prompt_hash, versions
from keepsight.results.staging import entries, room
from keepsight.results.storage import make_folder, to_json, write_file
from keepsight.results.thumbnails import read_thumbnails, write_thumbnails


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
            kind: what the run is, see the module. A run of one kind never replaces one of another.
            overwrite: replace a run that is already there. Only keepsight's own files are removed, and only from
                a folder that holds a run.
            extra: further JSON values for run.json. A ``note`` is a sentence that every report of the run shows.

        Raises:
            FileExistsError: if the folder holds a run and `overwrite` is off, a run of another kind, or something else.
            StorageError: if the folder cannot be written to.
        """
        path = Path(path)
        holds_run = check_vacant(path, overwrite, kind)
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
        check_vacant(path, overwrite, kind)
        with room(path) as stage:
            old = make_folder(stage / "old")
            run = cls.create(stage / "new", label=label, kind=kind, **known)
            yield run
            swap(run.path, path, old)
            run.path = path

    @classmethod
    def check(cls, path: str | Path, *, kind: str | None = None, overwrite: bool = False) -> None:
        """Raise now what `create` or `staged` would raise after the work; leaves nothing behind.

        Raises:
            FileExistsError, StorageError: as `create`.
        """
        path = Path(path)
        check_vacant(path, overwrite, kind)
        with room(path) as stage:
            write_file(stage / RUN_FILE, "{}\n")

    @classmethod
    def open(cls, path: str | Path) -> "RunDirectory":
        """The run that `path` holds.

        Raises:
            FileNotFoundError: if `path` holds no run.
            ValueError: if its run.json cannot be read.
        """
        path = Path(path)
        return cls(path, read_info(path))

    @property
    def kind(self) -> str | None:
        """What run.json says the run is; one that does not say and holds what only a training leaves is that."""
        return kind_of(self.path, self.info)

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
        """Where `config` is not the configuration that config.yaml holds: dotted name → (value there, value now).

        A run that was stopped before it wrote config.yaml holds nothing else either, and differs in nothing.

        Raises:
            ValueError: config.yaml is missing, and the run holds other files.
        """
        file = self.path / "config.yaml"
        if not file.is_file():
            if others := [name for name in entries(self.path) if name != RUN_FILE]:
                raise ValueError(
                    f"'{self.path}' has no config.yaml, so nothing tells with which settings its files "
                    f"({', '.join(others[:3])}) were made: put it back, or choose another folder"
                )
            return {}
        there = _flat(yaml.safe_load(file.read_text(encoding="utf-8")))
        now = _flat(_plain(config))
        names = dict.fromkeys([*there, *now])
        return {name: (there.get(name), now.get(name)) for name in names if there.get(name) != now.get(name)}

    def changes(self, config: Any, free: Collection[str] = ()) -> str:
        """`differences` in words, the first five, without the names in `free`; "" where there are none."""
        found = {name: both for name, both in self.differences(config).items() if name not in free}
        return "; ".join(f"{name}: {was!r}, now {now!r}" for name, (was, now) in list(found.items())[:5])

    def write_per_image(self, values: PerImage) -> None:
        """Write per_image.npy and per_image.json, in place of those that were there."""
        write_per_image(self.path, values)

    def write_examples(self, examples: Iterable[Example]) -> None:
        """Write pictures, masks and similarity maps to examples/, in place of those that were there."""
        write_examples(self.path / EXAMPLES, examples)

    def read_examples(self) -> list[Example]:
        """The pictures of examples/, in order; an empty list if there are none."""
        return read_examples(self.path / EXAMPLES)

    def write_answers(self, answers: Iterable[AnswerRecord]) -> None:
        """Write answers.jsonl, in place of the one that was there."""
        write_answers(self.path, answers)

    def read_answers(self) -> list[AnswerRecord]:
        """What was asked and answered, in the order of the questions; an empty list if there is nothing."""
        return read_answers(self.path)

    def write_thumbnails(self, pictures: Iterable[tuple[str, str, Image.Image]]) -> int:
        """Keep small copies of the pictures that the answers are about: (task, name, picture) each. How many."""
        return write_thumbnails(self.path, pictures)

    def write_points(self, points: Iterable[Point]) -> None:
        """Write points.jsonl, in place of the one that was there."""
        write_points(self.path, points)

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
            per_image=read_per_image(self.path),
            answers=self.read_answers(),
            thumbnails=read_thumbnails(self.path),
            points=read_points(self.path),
        )

    def _write_info(self) -> None:
        write_file(self.path / RUN_FILE, to_json(self.info))

    def _remove_results(self) -> None:
        for entry in own_entries(self.path):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _plain(config: Any) -> dict[str, Any]:
    plain = asdict(config) if is_dataclass(config) and not isinstance(config, type) else dict(config)
    # Through JSON, so that tuples, paths and enums become plain values that any YAML reader takes.
    return json.loads(json.dumps(plain, default=str))


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
