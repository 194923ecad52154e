"""Attribution: what a model pays for its skill, over its training.

The paper's claim ("visual sacrifice"): over training the answers get better while a linear probe of the middle layers
reads less. For each layer, Pearson's r over the points of one training between its skill (share of questions answered
right) and what the layer still tells: probe accuracy of each label set, and fidelity. A single training gives one r and
no interval: its points are a trend, not a sample (permuting 12 points of a random walk is "significant" at 0.05 every
third time). Inference is over trainings of several seeds: Fisher's z of each, Student's t over them. Definitions: ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from keepsight.diagnosis import diagnose
from keepsight.evaluation import Question, evaluate
from keepsight.results import RUN_FILE, Measurement, RunDirectory, merged
from keepsight.results.intervals import mean_interval

SKILL = "answer_accuracy"
TOLD = ("probe_accuracy", "fidelity")
FEWEST = 3  # points that an r is taken over


@dataclass(frozen=True)
class Point:
    """One model on the way: its name and its rows."""

    name: str
    rows: Sequence[Measurement]

    @property
    def skill(self) -> float | None:
        """Share of all questions answered right."""
        return next((row.value for row in self.rows if row.metric == SKILL and not row.target), None)


def look(
    models: Iterable[tuple[str, Callable[[], tuple[Any, Any]]]],
    images: Any,
    questions: Sequence[Question],
    out: str | Path,
    *,
    settings: dict[str, Any] | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 32,
    config: Any = None,
    told: Callable[[str, bool], None] = lambda name, done: None,
) -> list[Point]:
    """Diagnose every model and ask it the questions; each in a folder of its own in `out`.

    What lies there finished, from the same settings, is not done again: a stopped attribution goes on.

    Args:
        models: (name, what gives model and processor), in order; called only where there is something to do.
        images: as `diagnose` takes them; settings: its further arguments.
        config: what the points hang on, written with each; a point with another one is refused.
        told: called with each name, and whether it was done before.

    Raises:
        ValueError: a point that lies in `out` is from other settings.
        StorageError: a point cannot be written; those before it are kept.
    """
    points = []
    for name, load in models:
        folder = Path(out) / name
        there = (folder / RUN_FILE).is_file()
        told(name, there)
        if there:
            run = RunDirectory.open(folder)
            if changes := run.changes(config or {}):
                raise ValueError(f"'{folder}' was made with other settings ({changes}); choose another --out")
        else:
            model, processor = load()
            options: dict[str, Any] = {"metrics": ("probes", "fidelity"), "progress": False, **(settings or {})}
            seen = diagnose(model, processor, images, label_run=name, **options)
            said = evaluate(model, processor, questions, batch_size=batch_size, max_new_tokens=max_new_tokens)
            kept = [part for part in (seen.per_image, said.per_image) if part is not None]
            both = replace(seen, rows=[*seen.rows, *said.rows], per_image=merged(kept), examples=[])
            run = both.save(folder, config=config or {})
        points.append(Point(name, run.read_rows()))
    return points


def correlations(points: Sequence[Point]) -> list[Measurement]:
    """r of skill with each probe and with fidelity, at every layer, as rows `attribution`.

    `target` is the probes' label set, or "fidelity"; `n` counts points. No interval, see the module.
    """
    series: dict[tuple[str, int | None], dict[str, float]] = {}
    for point in points:
        for row in point.rows:
            if row.metric in TOLD and not row.variant and row.tokens == "all" and row.value is not None:
                name = "fidelity" if row.metric == "fidelity" else row.target
                series.setdefault((name, row.layer), {})[point.name] = row.value
    skills = {point.name: point.skill for point in points}
    rows = []
    for (name, layer), values in series.items():
        pairs = [(skill, values[at]) for at, skill in skills.items() if at in values and skill is not None]
        rows.append(_row(name, layer, np.array(pairs, dtype=np.float64).reshape(-1, 2)))
    return rows


def _row(name: str, layer: int | None, pairs: np.ndarray) -> Measurement:
    common: dict[str, Any] = {"layer": layer, "n": len(pairs), "unit": "checkpoints", "target": name}
    if len(pairs) < FEWEST:
        return Measurement("attribution", None, note=f"{len(pairs)} points; at least {FEWEST} are needed", **common)
    if (np.ptp(pairs, axis=0) == 0).any():
        return Measurement("attribution", None, note="one of the two does not change over the training", **common)
    r = float(np.corrcoef(pairs.T)[0, 1])
    return Measurement("attribution", r, note="one training: an r without an interval", **common)


def over_seeds(trainings: Sequence[Sequence[Measurement]]) -> list[Measurement]:
    """The rows of several trainings as one: tanh of the mean of Fisher's z, and of its t-interval over trainings."""
    if len(trainings) == 1:
        return list(trainings[0])
    indexed = [{row.key: row for row in rows} for rows in trainings]
    rows = []
    for key, first in indexed[0].items():
        found = [row.value for rows_of in indexed if (row := rows_of.get(key)) is not None and row.value is not None]
        common: dict[str, Any] = {"layer": key.layer, "n": len(found), "unit": "seeds", "target": key.target}
        if len(found) < len(trainings):
            why = f"{len(trainings) - len(found)} of {len(trainings)} trainings have no r ({first.note})"
            rows.append(Measurement("attribution", None, note=why, **common))
            continue
        z = mean_interval(np.arctanh(np.clip(found, -1 + 1e-9, 1 - 1e-9)))
        value, low, high = (None if end is None else math.tanh(end) for end in (z.value, z.low, z.high))
        rows.append(Measurement("attribution", value, low=low, high=high, note="Fisher's z over trainings", **common))
    return rows
