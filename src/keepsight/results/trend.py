"""How skill and what the layers still tell move together over a training, as r; and over trainings, with an interval.

A single training gives one r and no interval: its points are a trend, not a sample (permuting 12 points of a random
walk is "significant" at 0.05 every third time). Inference is over trainings of several seeds: Fisher's z of each,
Student's t over them. Definitions: ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from keepsight.results.intervals import mean_interval
from keepsight.results.measurement import Measurement
from keepsight.results.points import Point

ATTRIBUTION = "attribution"  # the metric's name
FEWEST = 3  # points that an r is taken over


def correlations(points: Sequence[Point]) -> list[Measurement]:
    """Pearson's r of skill with each probe and with fidelity, at every layer, over the points of one training.

    `target` is the probes' label set, or "fidelity"; `n` counts points. No interval, see the module.
    """
    pairs: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for point in points:
        skill = point.skill
        for place, row in point.told.items():
            known = pairs.setdefault(place, [])
            if skill is not None and skill.value is not None and row.value is not None:
                known.append((skill.value, row.value))
    return [
        _row(target, layer, np.array(found, dtype=np.float64).reshape(-1, 2))
        for (target, layer), found in pairs.items()
    ]


def _row(target: str, layer: int, pairs: np.ndarray) -> Measurement:
    common: dict[str, Any] = {"layer": layer, "n": len(pairs), "unit": "checkpoints", "target": target}
    if len(pairs) < FEWEST:
        return Measurement(ATTRIBUTION, None, note=f"{len(pairs)} points; at least {FEWEST} are needed", **common)
    if (np.ptp(pairs, axis=0) == 0).any():
        return Measurement(ATTRIBUTION, None, note="one of the two does not change over the training", **common)
    r = float(np.corrcoef(pairs.T)[0, 1])
    return Measurement(ATTRIBUTION, r, note="one training: an r without an interval", **common)


def over_seeds(trainings: Sequence[Sequence[Measurement]]) -> list[Measurement]:
    """The rows of several trainings as one: tanh of the mean of Fisher's z, and of its t-interval over trainings."""
    if len(trainings) == 1:
        return list(trainings[0])
    indexed = [{row.key: row for row in rows} for rows in trainings]
    rows = []
    for key in dict.fromkeys(key for rows_of in indexed for key in rows_of):
        every = [rows_of.get(key) for rows_of in indexed]
        found = [row.value for row in every if row is not None and row.value is not None]
        common: dict[str, Any] = {"layer": key.layer, "n": len(found), "unit": "seeds", "target": key.target}
        if len(found) < len(trainings):
            notes = dict.fromkeys("not measured" if row is None else row.note for row in every if _lacks(row))
            why = f"{len(trainings) - len(found)} of {len(trainings)} trainings have no r ({'; '.join(notes)})"
            rows.append(Measurement(ATTRIBUTION, None, note=why, **common))
            continue
        z = mean_interval(np.arctanh(np.clip(found, -1 + 1e-9, 1 - 1e-9)))
        value, low, high = (None if end is None else math.tanh(end) for end in (z.value, z.low, z.high))
        rows.append(Measurement(ATTRIBUTION, value, low=low, high=high, note="Fisher's z over trainings", **common))
    return rows


def _lacks(row: Measurement | None) -> bool:
    return row is None or row.value is None
