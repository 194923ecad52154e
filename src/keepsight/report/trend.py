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
            text = "no r" if row.value is None else write_number(row.metric, row.value)
            sample = row.note if row.value is None else f"{row.n} {row.unit}"
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
    start = f"{run.label}: over {'one training' if trainings == 1 else f'{trainings} trainings'}"
    layer = f"the middle layer ({run.middle} of {run.depth})"
    every = _middle(run)
    rows = [row for row in every if row.value is not None]
    if not rows:
        notes = "; ".join(dict.fromkeys(row.note for row in every)) or "it was not measured"
        return f"{start}, answers and what {layer} tells cannot be set against each other: {notes}"
    said = rows if trainings == 1 else [row for row in rows if _told(row)]
    against = _listed([row for row in said if (row.value or 0) < 0])
    together = _listed([row for row in said if (row.value or 0) >= 0])
    parts = [f"go against each other in {against}"] if against else []
    parts += [f"go together in {together}"] if together else []
    text = f"{start}, answers and what {layer} tells {' and '.join(parts)}"
    if not said:
        text = f"{start}, no trend can be told at {layer}: every 95 % interval contains zero ({_listed(rows)})"
    elif rest := [row for row in rows if row not in said]:
        text += f"; no trend can be told in {_listed(rest)}"
    if lacking := [row for row in every if row.value is None]:
        text += f"; no r of {', '.join(row.target for row in lacking[:_LISTED])}: {lacking[0].note}"
    return f"{text}; {TREND}" if trainings == 1 else text


def _listed(rows: Sequence[Measurement]) -> str:
    texts = [f"{row.target} (r = {write_value(row)})" for row in rows[:_LISTED]]
    if len(rows) > _LISTED:
        texts.append(f"{len(rows) - _LISTED} more")
    return " and ".join(filter(None, [", ".join(texts[:-1]), *texts[-1:]]))
