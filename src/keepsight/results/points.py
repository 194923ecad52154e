"""The points of an attribution: models on the way of one training or several, and points.jsonl, which holds them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from keepsight.results.measurement import Measurement, row_of
from keepsight.results.storage import write_file

POINTS = "points.jsonl"
SKILL = "answer_accuracy"
FIDELITY = "fidelity"
TOLD = ("probe_accuracy", FIDELITY)
CHANCE = "probe_chance"


@dataclass(frozen=True)
class Point:
    """One model on the way: its name, its rows, and the training that it is of."""

    name: str
    rows: Sequence[Measurement]
    training: str = ""

    @property
    def skill(self) -> Measurement | None:
        """Share of all questions answered right."""
        return next((row for row in self.rows if row.metric == SKILL and not row.target), None)

    @property
    def told(self) -> dict[tuple[str, int], Measurement]:
        """What the layers still tell: probe accuracy by (label set, layer), fidelity by ("fidelity", layer)."""
        return {
            (FIDELITY if row.metric == FIDELITY else row.target, row.layer): row
            for row in self.rows
            if row.metric in TOLD and not row.variant and row.tokens == "all" and row.layer is not None
        }

    def chance(self, target: str) -> float | None:
        """What a probe of `target` would reach without looking."""
        return next((row.value for row in self.rows if row.metric == CHANCE and row.target == target), None)


def by_training(points: Iterable[Point]) -> dict[str, list[Point]]:
    """The points of each training, in their order."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.training, []).append(point)
    return found


def write_points(folder: Path, points: Iterable[Point]) -> Path:
    """Write points.jsonl: each point's skill, what its layers tell, and chance; one row a line, in one step.

    Raises:
        StorageError: if the disk is full or the folder may not be written to.
    """
    lines = []
    for point in points:
        rows = [point.skill, *point.told.values(), *(row for row in point.rows if row.metric == CHANCE)]
        lines += [{"training": point.training, "point": point.name, **asdict(row)} for row in rows if row]
    return write_file(folder / POINTS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_points(folder: Path) -> list[Point]:
    """What `write_points` wrote; an empty list where a run has none.

    Raises:
        ValueError: if a line is cut off or is no such row; the text names file and line.
    """
    path = folder / POINTS
    if not path.is_file():
        return []
    found: dict[tuple[str, str], list[Measurement]] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            try:
                row = json.loads(line)
                names = row.pop("training"), row.pop("point")
            except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as cause:
                raise ValueError(
                    f"{place}: this line is no row of a point ({cause}); the file was cut off or edited: give the same "
                    "`keepsight attribute` again, which writes it anew from what is done"
                ) from cause
            if not all(isinstance(name, str) for name in names):
                raise ValueError(f"{place}: training and point are {names!r}; both are strings")
            found.setdefault(names, []).append(row_of(row, place))
    return [Point(name, rows, training) for (training, name), rows in found.items()]
