"""Runs that differ in their seed only are one arm: means over the seeds, with intervals over seeds or over pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from keepsight.results.intervals import mean_interval
from keepsight.results.loaded import LoadedRun
from keepsight.results.measurement import Key, Measurement
from keepsight.results.per_image import PerImage

Over = Literal["seeds", "images"]


def arms(runs: Sequence[LoadedRun]) -> list[list[LoadedRun]]:
    """Runs of one label together, labels in the order in which they first appear."""
    found: dict[str, list[LoadedRun]] = {}
    for run in runs:
        found.setdefault(run.label, []).append(run)
    return list(found.values())


def pool(runs: Sequence[LoadedRun], over: Over = "seeds") -> LoadedRun:
    """An arm as one run: every number the mean over its runs, where all of them have it.

    Args:
        runs: of one label; one run is returned as it is.
        over: what the intervals are over. "seeds": a t-interval over the runs' values, which is what a claim about a
            training recipe needs; two arms whose runs have the same training seeds are compared in pairs. "images": a
            t-interval over what each picture adds on average over the runs, which says nothing of other seeds; numbers
            not kept by picture have none.

    Raises:
        ValueError: two runs are of the same weights, or differ in depth, width or the layer of PRe.
    """
    first = runs[0]
    if len(runs) == 1:
        return first
    models = [(run.info.get("model") or {}).get("fingerprint") for run in runs]
    for number, model in enumerate(models):
        if model and model in models[:number]:
            raise ValueError(
                f"two runs labelled '{first.label}' are of the same weights ({model[:12]}), so they are no replicates; "
                "leave one out, or give them labels of their own (keepsight diagnose --label)"
            )
    for fact, what in (("depth", "layers"), ("width", "channels"), ("pre_layer", "as PRe's layer")):
        if len(told := dict.fromkeys(run.info.get(fact) for run in runs if run.info.get("depth"))) > 1:
            raise ValueError(
                f"runs labelled '{first.label}' have {' and '.join(map(str, told))} {what}, so they are no seeds of "
                "one arm; give them labels of their own (keepsight diagnose --label)"
            )
    indexed = [{row.key: row for row in run.rows} for run in runs]
    keys = [key for key in indexed[0] if all(key in rows for rows in indexed)]
    values = np.array([[_number(rows[key].value) for rows in indexed] for key in keys]).reshape(len(keys), len(runs))
    kept = PerImage(_seed_names(runs), keys, values) if over == "seeds" else _average(runs)
    pooled = [_row(indexed[0][key], key, row, kept, over, len(runs)) for key, row in zip(keys, values, strict=True)]
    seeds = sorted({seed for run in runs if (seed := training_seed(run)) is not None})
    return replace(first, rows=pooled, info={**first.info, "seeds": seeds}, per_image=kept, answers=())


def training_seed(run: LoadedRun) -> int | None:
    """The seed that the diagnosed model was trained with, where its run says so."""
    seed = run.info.get("training_seed")
    return seed if isinstance(seed, int) else None


def _row(row: Measurement, key: Key, values: np.ndarray, kept: PerImage | None, over: Over, n: int) -> Measurement:
    mean = float(values.mean())
    if np.isnan(mean):
        why = f"{int(np.isnan(values).sum())} of {n} runs have no value"
        return replace(row, value=None, low=None, high=None, note="; ".join(filter(None, [why, row.note])))
    note = f"mean of {n} seeds, interval over {over}" + ("" if row.n is None else f"; {row.n} {row.unit} each")
    if over == "seeds":
        row = replace(row, n=n, unit="seeds")
        found = mean_interval(values)
    else:
        found = mean_interval(kept.of(key) if kept and key in kept else np.empty(0))
    return replace(row, value=mean, low=found.low, high=found.high, note=note, seed=None)


def _average(runs: Sequence[LoadedRun]) -> PerImage | None:
    """What each picture adds on average, over the pictures and numbers that all runs hold."""
    kept = [run.per_image for run in runs]
    first = kept[0]
    if first is None or None in kept:
        return None
    images = [name for name in first.images if all(item is not None and name in item.images for item in kept)]
    keys = [key for key in first.keys if all(item is not None and key in item for item in kept)]
    columns = [[list(item.images).index(name) for name in images] for item in kept if item is not None]
    rows = [
        np.mean([item.of(key)[column] for item, column in zip(kept, columns, strict=True) if item is not None], axis=0)
        for key in keys
    ]
    return PerImage(images, keys, np.array(rows).reshape(len(keys), len(images)))


def _seed_names(runs: Sequence[LoadedRun]) -> list[str]:
    """Names by which the runs of two arms are paired; a run whose seed is not known has one of its own."""
    seeds = [training_seed(run) for run in runs]
    known = None not in seeds and len(set(seeds)) == len(seeds)
    return [
        f"seed {seed}" if known else f"{run.label} {i}" for i, (run, seed) in enumerate(zip(runs, seeds, strict=True))
    ]


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
