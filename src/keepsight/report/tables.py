"""The summary table: every metric at layer 0, the middle and the last layer, run beside run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from rich.table import Table
from rich.text import Text

from keepsight.report.csv_links import csv_uri
from keepsight.report.curves import Run, Series, open_runs, target_groups, targets_of
from keepsight.report.findings import difference
from keepsight.report.metrics import (
    ASKED,
    ATTRIBUTION,
    NEVER_ASKED,
    PARTS,
    PRUNING,
    SECTIONS,
    control_of,
    difference_parts,
    metric,
    write_interval,
    write_number,
    write_sample,
)
from keepsight.results import LoadedRun, Measurement, RunDirectory
from keepsight.results.tasks import ANSWER_METRICS

_SHORT = ("probe_accuracy", "gap", "contrast", "participation_ratio", "sink_tokens", "attribution")  # for the terminal
_ALL_VARIANTS = ("gap", *PRUNING)  # raw and centred, and all prunings, side by side


@dataclass(frozen=True)
class Cell:
    """A number, its interval, and what else is known of it."""

    value: str
    interval: str = ""
    note: str = ""
    told: bool = True  # for differences: the interval leaves zero out


@dataclass(frozen=True)
class Line:
    """One line of the table. `title` is the same for the lines of one metric."""

    title: str
    place: str  # "0", "4 (middle)", "8 (last)"
    values: tuple[Cell, ...]  # one a run
    differences: tuple[Cell, ...]  # one a run after the first
    sample: str
    counts: tuple[tuple[int, str], ...]  # n and unit of each row
    group: str = ""  # "asked", "never asked" or not declared


def summary(runs: Sequence[Run], *, full: bool = True) -> list[Line]:
    """The lines of the table; `full=False` keeps the metrics that a terminal has room for."""
    named = [name for section in (*SECTIONS, ATTRIBUTION) for name in section.metrics if name not in PRUNING]
    # Of prunings there are many: they come last.
    wanted = [name for name in (*named, *PRUNING) if full or name in _SHORT]
    lines = [line for name in wanted for item in _series(runs, name) for line in _lines(runs, *item)]
    if full:
        return lines
    said = answers(runs)
    return lines + said[:1] if lines else said  # a run of answers only: by type, too


def csv_of_lines(runs: Sequence[Run]) -> str:
    """The table as a CSV, as `csv_uri` gives it: a line for each number of each run."""
    rows = [
        {
            "measure": line.title,
            "group": line.group,
            "layer": line.place,
            "run": run.label,
            "value": value.value,
            "interval": value.interval,
            "difference": difference.value,
            "its interval": difference.interval,
            "n, seed": line.sample,
        }
        for line in summary(runs)
        for run, value, difference in zip(runs, line.values, (Cell(""), *line.differences), strict=True)
    ]
    columns = ["measure", "group", "layer", "run", "value", "interval", "difference", "its interval", "n, seed"]
    return csv_uri(columns, rows)


def answers(runs: Sequence[Run]) -> list[Line]:
    """Answer accuracy and its kin, all questions first, then by question type."""
    lines = []
    for target in sorted(targets_of(runs, "answer_accuracy"), key=lambda target: target != ""):
        for name in ANSWER_METRICS:
            rows = [run.at(Series(name, target), None) for run in runs]
            if any(rows):
                title = f"{metric(name).title}, {target or 'all questions'}"
                lines.append(_line(title, "", name, runs, rows))
    return lines


def others(runs: Sequence[Run]) -> list[tuple[str, str, Measurement]]:
    """(run, what, row) of every row without a layer, and of every metric that no figure shows.

    A number without sinks is listed where it is not that of all tokens.
    """
    shown = {*PRUNING, *(name for section in SECTIONS for name in (*section.metrics, *section.more))}
    apart = {"answer_accuracy", "answer_prior", "answer_f1", "pair_accuracy", "probe_chance"}  # in figures of their own
    found = []
    for run in runs:
        for series, curve in run.curves.items():
            if series.metric in apart:
                continue
            parts = (series.target, series.variant, "" if series.tokens == "all" else series.tokens)
            details = ", ".join(part for part in parts if part)
            for layer, row in curve.items():
                same = run.at(series._replace(tokens="all"), layer) if series.tokens != "all" else None
                if same and same == replace(row, tokens="all"):
                    continue
                if layer is None or series.metric not in shown:
                    place = "" if layer is None else f", layer {layer}"
                    name = metric(series.metric).title + (f" ({details})" if details else "") + place
                    found.append((run.label, name, row))
    return found


@dataclass(frozen=True)
class Said:
    """What the lens reads at one layer: a cell a run, its note the most frequent words."""

    layer: int
    cells: tuple[Cell, ...]


def said(runs: Sequence[Run]) -> list[Said]:
    """Silencing and the words behind it, layer by layer; empty where no run has a lens."""
    rows = [run.curves.get(Series("silencing"), {}) for run in runs]
    layers = sorted({layer for found in rows for layer in found if layer is not None})
    return [Said(layer, tuple(_said(found.get(layer)) for found in rows)) for layer in layers]


def _said(row: Measurement | None) -> Cell:
    if row is None:
        return Cell("–")
    words = row.note.partition("most frequent: ")[2]
    number, interval = write_number(row.metric, row.value), write_interval(row.metric, row.low, row.high)
    return Cell(number, interval, words or row.note)


def table(runs: Sequence[RunDirectory | LoadedRun | Measurement], *, title: str = "", full: bool = False) -> Table:
    """The summary as a table for the terminal, of runs or of the bare rows of one run.

    Args:
        full: all metrics instead of the headline ones.

    Raises:
        ValueError: if there is nothing to show, or two rows for the same number.
    """
    rows = [item for item in runs if isinstance(item, Measurement)]
    loaded = [item for item in runs if not isinstance(item, Measurement)]
    if rows:
        loaded.insert(0, LoadedRun("value", rows))
    opened = open_runs(loaded)
    grid = Table(title=Text(title) if title else None, title_justify="left", header_style="bold", pad_edge=False)
    # In a narrow terminal intervals go on a second line; what a row measures is never squeezed out.
    grid.add_column("measure", min_width=16)
    grid.add_column("layer", no_wrap=True)
    for run in opened:
        grid.add_column(Text(run.label), justify="right", min_width=13)
    for run in opened[1:]:
        name = "difference" if len(opened) == 2 else f"{run.label} − {opened[0].label}"
        grid.add_column(Text(name), justify="right", min_width=13)
    previous = None
    lines = summary(opened, full=full)
    for line, following in zip_longest(lines, lines[1:]):
        cells = [Text(line.title if line.title != previous else "")]
        if line.group and line.title != previous:
            cells[0].append(f" {line.group}", style="dim")
        cells.append(Text(line.place))
        cells += [_rich(cell) for cell in line.values]
        cells += [_rich(cell, style="bold" if cell.told else "dim") for cell in line.differences]
        grid.add_row(*cells, end_section=following is None or following.title != line.title)
        previous = line.title
    grid.caption, grid.caption_justify = Text(_counts(lines), style="dim"), "left"
    return grid


def _counts(lines: Sequence[Line]) -> str:
    """ "n = 118 to 121 images (Probe accuracy), 4,096 tokens (Sink tokens)"; no names where all are of as many."""
    counts: dict[tuple[str, str], set[int]] = {}
    for line in lines:
        for n, unit in line.counts:
            counts.setdefault((line.title.partition(",")[0], unit), set()).add(n)
    names: dict[str, list[str]] = {}
    for (name, unit), found in counts.items():
        ends = sorted({min(found), max(found)})
        names.setdefault(" to ".join(f"{end:,}" for end in ends) + f" {unit}", []).append(name)
    if len(names) < 2:
        return f"n = {next(iter(names))}" if names else ""
    return "n = " + ", ".join(f"{text} ({', '.join(named)})" for text, named in names.items())


def _series(runs: Sequence[Run], name: str) -> Iterator[tuple[str, str, Series]]:
    """(title, group, series) of every line of a metric: what was never asked first."""
    groups = target_groups(runs)
    order = {NEVER_ASKED: 0, ASKED: 1}
    targets = [target for target in targets_of(runs, name) if not target.startswith(PARTS)]
    for target in sorted(targets, key=lambda target: order.get(groups.get(target, ""), 2)):
        chosen = [] if name in PRUNING else [run.headline(name, target) for run in runs]
        if name in _ALL_VARIANTS:
            chosen += [
                s
                for run in runs
                for s in run.select(name)
                if (s.target, s.tokens) == (target, "all") and control_of(s.variant) is None
            ]
        for series in dict.fromkeys(item for item in chosen if item):
            details = ", ".join(part for part in (target, series.variant) if part)
            yield metric(name).title + (f", {details}" if details else ""), groups.get(target, ""), series


def _lines(runs: Sequence[Run], title: str, group: str, series: Series) -> list[Line]:
    """Layer 0, middle and last; each run is read at its own."""
    lines = []
    for name, layers in (
        ("", [0 for _ in runs]),
        ("middle", [run.middle for run in runs]),
        ("last", [run.depth for run in runs]),
    ):
        rows = [run.at(series, layer) for run, layer in zip(runs, layers, strict=True)]
        if any(rows):
            place = "/".join(str(layer) for layer in dict.fromkeys(layers))
            lines.append(_line(title, f"{place} {name}".strip(), series.metric, runs, rows, group))
    return lines


def _line(
    title: str, place: str, name: str, runs: Sequence[Run], rows: Sequence[Measurement | None], group: str = ""
) -> Line:
    values = tuple(
        Cell(write_number(name, row.value), write_interval(name, row.low, row.high), row.note) if row else Cell("–")
        for row in rows
    )
    samples = dict.fromkeys(write_sample(row) for row in rows if row)
    counts = tuple((row.n, row.unit) for row in rows if row and row.n is not None)
    first = rows[0]
    differences = []
    for run, row in zip(runs[1:], rows[1:], strict=True):
        found = difference(runs[0], first, run, row) if first and row else None
        if found is None or found.value is None:
            differences.append(Cell("–", told=False))
            continue
        number, interval = difference_parts(name, found.value, found.low, found.high)
        differences.append(Cell(number, interval, told=found.told))
    return Line(title, place, values, tuple(differences), "; ".join(samples), counts, group)


def _rich(cell: Cell, style: str = "") -> Text:
    text = Text(cell.value, style=style)
    if cell.interval:
        text.append(f" {cell.interval}", style="dim")
    return text
