"""Differences between arms as rows, and conditions judged on them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from keepsight.report.curves import Run, Series, apart, open_runs
from keepsight.report.findings import difference
from keepsight.report.metrics import PRUNING, control_of, difference_parts, write_interval, write_number, write_sample
from keepsight.results import LoadedRun, Measurement
from keepsight.results.arms import Over, pool
from keepsight.results.gate import Condition, verdict
from keepsight.results.intervals import Estimate
from keepsight.results.trend import ATTRIBUTION


def differences(arms: Sequence[Sequence[LoadedRun]]) -> list[Measurement]:
    """Every number of every later arm minus that of the first, at the same layer.

    The rows are called `difference of METRIC`, with the arms' names in the note and one row for each kind of interval:
    over images (`unit` "images") always, over seeds (`unit` "seeds") where both arms have several runs.
    """
    rows: list[Measurement] = []
    for other in arms[1:]:
        kinds: tuple[Over, ...] = ("images", "seeds") if min(len(arms[0]), len(other)) > 1 else ("images",)
        for over in kinds:
            base, later = open_runs([pool(arms[0], over), pool(other, over)])
            rows += _differences(base, later, over)
    return rows


def _differences(base: Run, other: Run, over: Over) -> Iterator[Measurement]:
    for series, curve in base.curves.items():
        for layer, before in curve.items():
            after = other.at(series, layer)
            if after is None or before.value is None or after.value is None:
                continue
            found = difference(base, before, other, after)
            yield Measurement(
                f"difference of {series.metric}",
                found.value,
                layer=layer,
                low=found.low,
                high=found.high,
                n=None if None in (before.n, after.n) else min(before.n or 0, after.n or 0),
                unit="seeds" if over == "seeds" else before.unit,
                target=series.target,
                variant=series.variant,
                tokens=series.tokens,
                note=f"{other.label} − {base.label}, interval over {over}",
            )


def judge(condition: Condition, runs: Sequence[LoadedRun]) -> tuple[str, list[str]]:
    """What becomes of a condition, and the numbers that it was judged on, in words.

    A condition without `delta` is about every run but the first (or the only one). Attributions are judged among
    themselves, on their r.

    Raises:
        ValueError: if no run has such a number, or there is no second run to take a difference to.
    """
    every = open_runs(runs)
    opened = apart(every)[condition.metric == ATTRIBUTION] or every
    if condition.delta and len(opened) < 2:
        raise ValueError(
            "'delta' is the difference from the first run; give two runs or more, with labels of their own: those of "
            "one label are averaged as seeds of one arm."
        )
    judged, told = [], []
    base, judging = opened[0], opened[1:] or opened
    for run in judging:
        for series, row in _rows(condition, run):
            found = Estimate(row.value, row.low, row.high)
            if condition.delta:
                curve = base.curves.get(series, {})
                before = curve.get(_layer(condition, base, curve))
                if before is None:
                    continue
                found = difference(base, before, run, row)
            outcome = condition.judge(found)
            judged.append(outcome)
            told.append(_told(run, row, found, outcome, condition.delta))
    if not judged:
        raise ValueError(_lacking(condition, base, judging))
    return verdict(judged), told


def _rows(condition: Condition, run: Run) -> Iterator[tuple[Series, Measurement]]:
    """The numbers that a condition is about: the headline variant of each target, or each pruning, at one layer."""
    for target in dict.fromkeys(series.target for series in run.select(condition.metric)):
        headline = run.headline(condition.metric, target)
        if headline is None or condition.target not in (None, target):
            continue
        alike = [
            series
            for series in run.select(condition.metric)
            if condition.metric in PRUNING and series.target == target and control_of(series.variant) is None
        ]
        for series in alike or [headline]:
            curve = run.curves[series]
            if (row := curve.get(_layer(condition, run, curve))) is not None:
                yield series, row


def _layer(condition: Condition, run: Run, curve: Collection[int | None]) -> int | None:
    """The layer of a run's own that a condition is about."""
    if condition.layer is None and len(curve) == 1:
        return next(iter(curve))  # reported at one layer only, or of the whole model
    if isinstance(condition.layer, int):
        return condition.layer
    return run.depth if condition.layer == "last" else run.middle


def _lacking(condition: Condition, base: Run, runs: Sequence[Run]) -> str:
    """Why there is nothing to judge: no such metric, target or layer in `runs`, or none in `base`."""
    name = repr(condition.metric) + (f" of {condition.target!r}" if condition.target is not None else "")
    if any(True for run in runs for _ in _rows(condition, run)):
        return f"the first run, '{base.label}', has no {name} there, so there is no difference from it"
    found = {series.target: run.curves[series] for run in runs for series in run.select(condition.metric)}
    if condition.target is not None and found:
        if condition.target not in found:
            return f"no run has {name}; there is {condition.metric} of {', '.join(map(repr, found))}"
        found = {condition.target: found[condition.target]}
    layers = sorted({layer for curve in found.values() for layer in curve if layer is not None})
    if layers:
        place = _layer(condition, runs[0], layers)
        return (
            f"no run has {name} at layer {place}; it was "
            f"measured at {', '.join(map(str, layers))}: name one, as in '{condition.metric}@{layers[-1]}'"
        )
    known = sorted({series.metric for run in runs for series in run.curves})
    return f"no run has {name}; the metrics are {', '.join(known)}"


def _told(run: Run, row: Measurement, found: Estimate, outcome: str, delta: bool) -> str:
    if found.value is None:
        return f"{run.label}, {_name(row)}: {outcome}, no value ({row.note or found.note})"
    if delta:
        number, interval = difference_parts(row.metric, found.value, found.low, found.high)
    else:
        number, interval = write_number(row.metric, found.value), write_interval(row.metric, found.low, found.high)
    sample = f" ({sample})" if (sample := write_sample(row)) else ""
    return f"{run.label}, {_name(row)}: {outcome}, {number} {interval or 'without an interval'}{sample}"


def _name(row: Measurement) -> str:
    place = "" if row.layer is None else f" at layer {row.layer}"
    variant = f" ({row.variant})" if row.variant else ""
    return row.metric + (f"[{row.target}]" if row.target else "") + variant + place
