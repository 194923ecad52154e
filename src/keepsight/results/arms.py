"""Runs that differ in their seed only are one arm: means over the seeds, with intervals over seeds or over pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from keepsight.results.intervals import Estimate, mean_interval
from keepsight.results.loaded import LoadedRun
from keepsight.results.measurement import Key, Measurement
from keepsight.results.per_image import PerImage, merged

Over = Literal["seeds", "images"]


def arms(runs: Sequence[LoadedRun]) -> list[list[LoadedRun]]:
    """Runs of one label together, labels in the order in which they first appear; what `joined` joins is one run."""
    found: dict[str, list[LoadedRun]] = {}
    for run in joined(runs):
        found.setdefault(run.label, []).append(run)
    return list(found.values())


def joined(runs: Sequence[LoadedRun]) -> list[LoadedRun]:
    """The runs, those of one label and the same weights that hold different numbers as one: a model's diagnosis and
    its evaluation."""
    found: list[LoadedRun] = []
    for run in runs:
        at = next((number for number, other in enumerate(found) if _complement(other, run)), None)
        if at is None:
            found.append(run)
        else:
            found[at] = _join(found[at], run)
    return found


def _complement(one: LoadedRun, other: LoadedRun) -> bool:
    weights = [(run.info.get("model") or {}).get("fingerprint") for run in (one, other)]
    if one.label != other.label or not weights[0] or weights[0] != weights[1] or (one.answers and other.answers):
        return False
    if one.info.get("pruning") != other.info.get("pruning"):
        return False  # answers without most of the visual tokens are not the diagnosed model's
    return not {row.key for row in one.rows} & {row.key for row in other.rows}


def _join(one: LoadedRun, other: LoadedRun) -> LoadedRun:
    """What both tell, as the one with layers tells it."""
    main, more = (one, other) if one.info.get("depth") else (other, one)
    kept = [run.per_image for run in (main, more) if run.per_image is not None]
    commands = [str(run.info["command"]) for run in (main, more) if run.info.get("command")]
    return LoadedRun(
        main.label,
        [*main.rows, *more.rows],
        {**more.info, **main.info, **({"command": "\n".join(commands)} if commands else {})},
        "---\n".join(filter(None, (main.config, more.config))),
        main.examples or more.examples,
        merged(kept) if kept else None,
        main.answers or more.answers,
        main.thumbnails or more.thumbnails,
    )


def pool(runs: Sequence[LoadedRun], over: Over = "seeds") -> LoadedRun:
    """An arm as one run: every number the mean over its runs, where all of them have it.

    Args:
        runs: of one label; one run is returned as it is.
        over: what the intervals are over. "seeds": a t-interval over the runs' values, which is what a claim about a
            training recipe needs; two arms whose runs have the same training seeds are compared in pairs. "images": a
            t-interval over what each picture adds on average over the runs, which says nothing of other seeds; numbers
            not kept by picture have none. Nor have numbers that are the same in all.

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
    return replace(first, rows=pooled, info={**first.info, **_origin(runs)}, per_image=kept, answers=())


def _origin(runs: Sequence[LoadedRun]) -> dict[str, Any]:
    """What run.json would tell of an arm: the seeds, none where they are not known of all, and every run's weights and
    command."""
    told = [{**(run.info.get("model") or {}), "command": run.info.get("command")} for run in runs]
    names, weights, commands = (
        list(dict.fromkeys(str(one[fact]) for one in told if one.get(fact)))
        for fact in ("name", "fingerprint", "command")
    )
    seeds = [training_seed(run) for run in runs]
    return {
        "seeds": [] if None in seeds else sorted({seed for seed in seeds if seed is not None}),
        "model": {"name": ", ".join(names), "fingerprint": ", ".join(weights)},
        "command": "\n".join(commands),
    }


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
    else:
        values = kept.of(key) if kept and key in kept else np.empty(0)
        values = values[~np.isnan(values)]
    found = mean_interval(values)
    if len(values) > 1 and np.ptp(values) == 0:
        # Two seeds with as many right of a few test pictures: no spread was seen, and the interval would claim none.
        found, note = Estimate(mean), f"{note}; no interval: all {over} agree"
    return replace(row, value=mean, low=found.low, high=found.high, note=note, seed=None)


def _average(runs: Sequence[LoadedRun]) -> PerImage | None:
    """What each picture adds to the mean over the runs, of the numbers that all of them keep by picture."""
    kept = [run.per_image for run in runs if run.per_image is not None]
    if len(kept) < len(runs):
        return None
    place = {name: number for number, name in enumerate(dict.fromkeys(name for item in kept for name in item.images))}
    columns = [np.array([place[name] for name in item.images], dtype=np.int64) for item in kept]
    keys = [key for key in kept[0].keys if all(key in item for item in kept)]
    rows = [_shares([item.of(key) for item in kept], columns, len(place)) for key in keys]
    return PerImage(list(place), keys, np.array(rows).reshape(len(keys), len(place)))


def _shares(values: Sequence[np.ndarray], columns: Sequence[np.ndarray], n: int) -> np.ndarray:
    """[n], what each picture adds to the mean of several means; NaN for pictures in none of them.

    Of means over the same pictures it is the mean of what the picture adds to each. They need not be: the test
    pictures of a probe follow its seed. So it is made of the picture's influence on each, and averages to their mean
    all the same.

    Args:
        values: of each run, NaN for a picture without one; columns: which of the n pictures these are.
    """
    centre, moved, known = 0.0, np.zeros(n), np.zeros(n, dtype=bool)
    for each, where in zip(values, columns, strict=True):
        defined = ~np.isnan(each)
        if not defined.any():
            return np.full(n, np.nan)
        own = each[defined].mean()
        moved[where[defined]] += (each[defined] - own) / defined.sum()
        known[where[defined]] = True
        centre += own
    return np.where(known, (centre + known.sum() * moved) / len(values), np.nan)


def _seed_names(runs: Sequence[LoadedRun]) -> list[str]:
    """Names by which the runs of two arms are paired; a run whose seed is not known has one of its own."""
    seeds = [training_seed(run) for run in runs]
    known = None not in seeds and len(set(seeds)) == len(seeds)
    return [
        f"seed {seed}" if known else f"{run.label} {i}" for i, (run, seed) in enumerate(zip(runs, seeds, strict=True))
    ]


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
