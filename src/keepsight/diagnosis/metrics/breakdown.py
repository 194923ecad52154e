"""Patch structure by the size and the class of the objects. Ours."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from keepsight.diagnosis.collect.accumulate import OBJECT_SCOPES, OBJECT_VALUES, Accumulator
from keepsight.diagnosis.summary import scope_rows
from keepsight.results import Measurement, PerImageBuilder

# Patches of an object: COCO's bounds of 32² and 96² pixels in patches of 14 × 14.
SIZES = {"small": (2, 5), "medium": (6, 47), "large": (48, None)}
CLASSES = 20  # the most frequent ones, that a run has rows of
FEWEST = 10  # images that an object's class must be in


def object_groups(accumulator: Accumulator) -> dict[str, np.ndarray]:
    """Target → which of the objects that have pairs, bool [K]: three sizes, then classes, most images first."""
    image, patches = accumulator.object_table
    defined = ~np.isnan(accumulator.object_values.read(0)[:, 0])
    found: dict[str, np.ndarray] = {}
    for name, (low, high) in SIZES.items():
        found[f"objects: {name}"] = defined & (patches >= low) & (patches <= (high or np.inf))
    classes = np.array(accumulator.object_classes, dtype=object)
    known = np.flatnonzero(defined & (classes != ""))
    images = Counter(kind for kind, _ in {(classes[k], int(image[k])) for k in known})
    for kind, count in sorted(images.items(), key=lambda item: (-item[1], item[0]))[:CLASSES]:
        if count >= FEWEST:
            found[f"objects: {kind}"] = defined & (classes == kind)
    return found


def object_rows(accumulator: Accumulator, per_image: PerImageBuilder, *, seed: int) -> list[Measurement]:
    """Cohesion, coupling, gap and contrast of each group of objects at every layer: object → image → images.

    Classes have rows of all tokens only. A size that no object has gets one row that says so.
    """
    rows: list[Measurement] = []
    if not accumulator.objects:
        return rows
    groups = object_groups(accumulator)
    image = accumulator.object_table[0]
    for target, members in groups.items():
        if not members.any():
            why = f"no object of this size ({_bounds(target)} patches)"
            rows.append(Measurement("gap", None, target=target, variant="raw", seed=seed, note=why))
    for position, layer in enumerate(accumulator.layers):
        table = accumulator.object_values.read(position)
        for target, members in groups.items():
            if not members.any():
                continue
            size = target.removeprefix("objects: ") in SIZES
            for number, scope in enumerate(OBJECT_SCOPES if size else OBJECT_SCOPES[:1]):
                values: dict[str, np.ndarray] = {}
                for place, name in enumerate(OBJECT_VALUES):
                    each = table[:, number * len(OBJECT_VALUES) + place]
                    values[name] = _by_image(each, members, image, accumulator.pooled.rows)
                if all(np.isnan(column).all() for column in values.values()):
                    continue
                base: dict[str, Any] = {"layer": layer, "seed": seed, "tokens": scope, "target": target}
                note = f"{int(members.sum())} objects" + (f" of {_bounds(target)} patches" if size else "")
                for row, contributions in scope_rows(values, base, note):
                    rows.append(row)
                    per_image.add(row.key, contributions)
    return rows


def _by_image(values: np.ndarray, members: np.ndarray, image: np.ndarray, images: int) -> np.ndarray:
    """[images]: mean over the members in each image, NaN without any."""
    kept = members & ~np.isnan(values)
    count = np.bincount(image[kept], minlength=images)
    total = np.bincount(image[kept], values[kept].astype(np.float64), minlength=images)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _bounds(target: str) -> str:
    low, high = SIZES[target.removeprefix("objects: ")]
    return f"{low} to {high}" if high else f"{low} or more"
