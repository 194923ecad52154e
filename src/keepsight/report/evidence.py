"""The verdict's numbers as dots on a common scale, drawn in plain HTML so that they print and need no script."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from keepsight.report.csv_links import csv_uri
from keepsight.report.curves import Run, Series, targets_of
from keepsight.report.findings import Finding, between, within
from keepsight.report.metrics import metric, write_interval, write_number, write_sample
from keepsight.results import Measurement


@dataclass(frozen=True)
class Dot:
    """One number on a scale; positions in percent of the track's width."""

    run: int
    at: float | None
    low: float | None
    high: float | None
    text: str
    interval: str = ""
    told: bool = True
    sample: str = ""
    label: str = ""
    kind: str = "run"  # "run", or "prior" for the text-only prior


@dataclass(frozen=True)
class Track:
    """A line of the block: a label and its dots."""

    label: str
    group: str
    dots: list[Dot]


@dataclass(frozen=True)
class Block:
    """Tracks on one scale. `ticks` are (position in percent, text); `zero` is where no difference lies."""

    title: str
    tracks: list[Track]
    ticks: list[tuple[float, str]]
    zero: float | None = None

    def csv(self, runs: Sequence[Run]) -> str:
        """Its numbers as `csv_uri` gives them; `runs`: those that the dots tell by number."""
        columns = ["figure", "of", "group", "run", "kind", "value", "interval", "sample"]
        return csv_uri(
            columns,
            [
                {
                    "figure": self.title,
                    "of": track.label,
                    "group": track.group,
                    "run": runs[dot.run].label,
                    "kind": dot.kind,
                    "value": dot.text,
                    "interval": dot.interval,
                    "sample": dot.sample,
                }
                for track in self.tracks
                for dot in track.dots
            ],
        )


_TITLES = {
    "probe_drop": "Probe accuracy above chance, change from layer 0 to the middle in %",
    "probe_accuracy": "Probe accuracy at the middle layer, difference in points",
    "gap": "Patch gap, difference in cosine",
    "fidelity": "Fidelity to the encoder's output, difference in R²",
    "answer_accuracy": "Answers, difference in points",
}
_CHANGES = {  # of one run
    "gap": "Patch gap, change from layer 0 to the middle in cosine",
    "fidelity": "Fidelity to the encoder's output, change from layer 0 to the middle in R²",
}


def evidence(runs: Sequence[Run]) -> list[Block]:
    """What the verdict rests on: one block a metric, one track a finding, a zero line in each."""
    if len(runs) == 1:
        found = [(0, finding) for finding in within(runs[0])]
    else:
        found = [(number, item) for number, run in enumerate(runs) if number for item in between(runs[0], run)]
    blocks = []
    for name in _TITLES:
        chosen = [(run, finding) for run, finding in found if finding.metric == name]
        if not chosen:
            continue
        title = _CHANGES.get(name, _TITLES[name]) if len(runs) == 1 else _TITLES[name]
        blocks.append(_differences(title, name, chosen))
    return blocks


def answer_block(runs: Sequence[Run]) -> Block | None:
    """Answers of every run and the text-only prior, for all questions and by type; None without rows.

    F1 and pairs right have tracks of their own under the accuracy.
    """
    targets = sorted(targets_of(runs, "answer_accuracy"), key=lambda target: target != "")
    tracks = []
    for target in targets:
        dots = []
        priors: dict[str, Dot] = {}
        for number, run in enumerate(runs):
            if row := run.at(Series("answer_prior", target), None):
                dot = _share(number, row, "prior", "text-only prior")
                priors.setdefault(dot.text, dot)
            if row := run.at(Series("answer_accuracy", target), None):
                dots.append(_share(number, row, "run", run.label))
        tracks.append(Track(target or "all questions", "", [*priors.values(), *dots]))
        for name in ("answer_f1", "pair_accuracy"):
            rows = [(number, run.at(Series(name, target), None)) for number, run in enumerate(runs)]
            if dots := [_share(number, row, "run", runs[number].label) for number, row in rows if row]:
                tracks.append(Track(target or "all questions", metric(name).title, dots))
    ticks = [(float(percent), f"{percent} %") for percent in (0, 25, 50, 75, 100)]
    return Block("Answers", tracks, ticks) if tracks else None


def _share(run: int, row: Measurement, kind: str, label: str) -> Dot:
    at, low, high = (None if value is None else 100 * value for value in (row.value, row.low, row.high))
    text, interval = write_number(row.metric, row.value), write_interval(row.metric, row.low, row.high)
    return Dot(run, at, low, high, text, interval, True, write_sample(row), label, kind)


def _differences(title: str, name: str, found: Sequence[tuple[int, Finding]]) -> Block:
    ends = [end for _, f in found for end in (f.value, f.low, f.high) if end is not None]
    percent = metric(name).percent
    step = _step(min([0.0, *ends]), max([0.0, *ends]))
    low = step * math.floor(min([0.0, *ends]) / step)
    high = max(step * math.ceil(max([0.0, *ends]) / step), low + step)

    def place(value: float | None) -> float | None:
        return None if value is None else round(100 * (value - low) / (high - low), 2)

    tracks: dict[tuple[str, str], Track] = {}
    for run, f in found:
        number, _, interval = f.text.partition(" [")
        sample = "; ".join(dict.fromkeys(write_sample(row) for row in (f.before, f.after) if row))
        dot = Dot(
            run, place(f.value), place(f.low), place(f.high), number, interval and f"[{interval}", f.told, sample,
            f.caveat,
        )  # fmt: skip
        tracks.setdefault((f.label, f.group), Track(f.label, f.group, [])).dots.append(dot)
    if not any(f.value is not None for _, f in found):
        return Block(title, list(tracks.values()), [], place(0.0))  # reasons alone: there is no scale
    count = round((high - low) / step)
    values = [low + step * index for index in range(count + 1)]
    digits = max(0, -math.floor(math.log10(step * (100 if percent else 1)) + 1e-9))
    ticks = [(place(v) or 0.0, f"{v * (100 if percent else 1):+.{digits}f}".replace("-", "−")) for v in values]
    ticks = [(at, "0" if abs(value) < step / 2 else text) for (at, text), value in zip(ticks, values, strict=True)]
    return Block(title, list(tracks.values()), ticks, place(0.0))


def _step(low: float, high: float) -> float:
    """A round tick distance that gives two to five ticks from low to high."""
    span = (high - low) or 0.01
    power = 10.0 ** math.floor(math.log10(span))
    return next(power * factor for factor in (0.25, 0.5, 1, 2, 2.5) if span / (power * factor) <= 4)
