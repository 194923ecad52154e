"""What attributions show at their middle layers: one sentence, and r as dots on one scale."""

from __future__ import annotations

from collections.abc import Sequence

from keepsight.report.curves import Run
from keepsight.report.evidence import Block, Dot, Track
from keepsight.report.metrics import write_interval, write_number, write_value
from keepsight.results import Measurement
from keepsight.results.points import by_training

TREND = "one training gives one r and no interval: a trend, not a sample"
_LISTED = 4  # targets in one bracket; the rest are counted


def _middle(run: Run) -> list[Measurement]:
    rows = [run.at(series, run.middle) for series in run.select("attribution")]
    return [row for row in rows if row is not None]


def block(runs: Sequence[Run], first: int) -> Block:
    """r at the middle layer on a line from −1 to 1, one track a target.

    Args:
        first: the number of the first of `runs` among all runs of the page.
    """
    tracks: dict[str, Track] = {}
    for number, run in enumerate(runs, start=first):
        for row in _middle(run):
            ends = (row.value, row.low, row.high)
            at, low, high = (None if end is None else round(50 * (1 + end), 2) for end in ends)
            interval = write_interval(row.metric, row.low, row.high)
            text = write_number(row.metric, row.value) if row.value is not None else f"no r: {row.note}"
            sample = f"{row.n} {row.unit}" if row.value is not None else ""
            dot = Dot(number, at, low, high, text, interval, _told(row), sample)
            tracks.setdefault(row.target, Track(row.target, "", [])).dots.append(dot)
    ticks = [(50.0 * (1 + end), f"{end:+g}".replace("-", "−") if end else "0") for end in (-1, -0.5, 0, 0.5, 1)]
    layers = " / ".join(dict.fromkeys(f"{run.middle} of {run.depth}" for run in runs))
    return Block(f"r of skill with what the middle layer ({layers}) tells", list(tracks.values()), ticks, 50.0)


def _told(row: Measurement) -> bool:
    return row.low is not None and row.high is not None and (row.low > 0 or row.high < 0)


def sentence(runs: Sequence[Run]) -> str:
    """What the attributions show at their middle layers, in a sentence each that can be quoted."""
    return " ".join(f"{_one(run)}." for run in runs)


def _one(run: Run) -> str:
    trainings = len(by_training(run.loaded.points))
    over = "one training" if trainings == 1 else f"{trainings} trainings"
    start = f"{run.label}: over {over}, answers and what the middle layer ({run.middle} of {run.depth}) tells"
    rows = [row for row in _middle(run) if row.value is not None]
    if not rows:
        notes = "; ".join(dict.fromkeys(row.note for row in _middle(run))) or "the layer was not measured"
        return f"{start} cannot be set against each other: {notes}"
    said = rows if trainings == 1 else [row for row in rows if _told(row)]
    against = _listed([row for row in said if (row.value or 0) < 0])
    together = _listed([row for row in said if (row.value or 0) >= 0])
    parts = [f"go against each other in {against}"] if against else []
    parts += [f"go together in {together}"] if together else []
    text = f"{start} " + " and ".join(parts)
    if trainings == 1:
        return f"{text}; {TREND}"
    rest = _listed([row for row in rows if not _told(row)])
    if not said:
        why = "every 95 % interval contains zero, or there is none"
        return f"{run.label}: over {over}, no trend can be told at the middle layer: {why} ({rest})"
    return text + (f"; no trend can be told in {rest}" if rest else "")


def _listed(rows: Sequence[Measurement]) -> str:
    texts = [f"{row.target} (r = {write_value(row)})" for row in rows[:_LISTED]]
    if len(rows) > _LISTED:
        texts.append(f"{len(rows) - _LISTED} more")
    return " and ".join(filter(None, [", ".join(texts[:-1]), *texts[-1:]]))
