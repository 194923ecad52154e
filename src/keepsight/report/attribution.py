"""Attributions on the page: skill against what a layer still tells, checkpoint by checkpoint, and r by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from keepsight.report.csv_links import csv_of, csv_uri
from keepsight.report.curves import Run, Series, open_runs
from keepsight.report.evidence import Block
from keepsight.report.metrics import ATTRIBUTION, Section, metric, write_value
from keepsight.report.panels import Panel, draw_section, line_of
from keepsight.report.trend import block, sentence
from keepsight.results import LoadedRun, Measurement, Point
from keepsight.results.points import FIDELITY, by_training
from keepsight.results.trend import correlations


@dataclass(frozen=True)
class Course:
    """The checkpoints of one training, in their order."""

    number: int  # of its colour and mark
    run: int  # the attribution's place among the attributions
    label: str
    training: str
    points: list[Point]


@dataclass(frozen=True)
class Scatter:
    """One figure of the slider: `told` and the last column of `numbers` are of the layer that the page opens with."""

    id: str
    title: str
    help: str
    told: str
    csv: str  # a data URI
    numbers: list[tuple[str, str, str, str]]  # training, checkpoint, skill, what the layer tells
    data: dict[str, Any]  # for attribution.js


@dataclass(frozen=True)
class Group:
    """What is known of some targets: a scatter and a curve of r each."""

    title: str
    scatters: list[Scatter]
    curves: list[Panel]


@dataclass(frozen=True)
class Attribution:
    """The section. `runs` are the attributions, numbered from `first` among all runs of the page."""

    section: Section
    runs: list[Run]
    first: int
    courses: list[Course]
    layer: int  # the one that the page opens with
    groups: list[Group]
    more: list[Group]  # folded away
    block: Block  # r at the middle layer
    text: str
    data: dict[str, Any]  # what all scatters share, for attribution.js

    @property
    def panels(self) -> dict[str, dict[str, Any]]:
        """The figures' data by id."""
        groups = (*self.groups, *self.more)
        curves = {panel.id: panel.data | {"range": [-1.05, 1.05]} for group in groups for panel in group.curves}
        return curves | {scatter.id: scatter.data for group in groups for scatter in group.scatters}


def attribution(runs: Sequence[Run], first: int) -> Attribution | None:
    """The section of the attributions `runs`; None without any, or where nothing was measured by layer.

    Args:
        first: the number of the first among all runs of the page.
    """
    drawn = draw_section(runs, ATTRIBUTION)
    if drawn is None:
        return None
    courses = _courses(runs, first)
    layers = sorted({layer for run in runs for curve in run.curves.values() for layer in curve if layer is not None})
    layer = runs[0].middle if runs[0].middle in layers else layers[0]
    trainings = _trainings(runs, courses)

    def group(title: str, panels: Sequence[Panel]) -> Group:
        scatters = [_scatter(runs, courses, panel.target, _id(panel), layers, layer) for panel in panels]
        return Group(title, scatters, [_curve(panel, runs, trainings, first) for panel in panels])

    return Attribution(
        section=ATTRIBUTION,
        runs=list(runs),
        first=first,
        courses=courses,
        layer=layer,
        # What is no label set's comes first: fidelity, which nobody asks about either.
        groups=[group(item.title, item.panels) for item in sorted(drawn.groups, key=lambda item: bool(item.title))],
        more=[group(item.title, item.panels) for item in drawn.more],
        block=block(runs, first),
        text=sentence(runs),
        data={
            "layers": layers,
            "layer": layer,
            "courses": [
                {
                    "number": course.number,
                    "label": course.label,
                    "points": [point.name for point in course.points],
                    "y": [skill.value if (skill := point.skill) else None for point in course.points],
                    "text": [_written(point.skill) for point in course.points],
                }
                for course in courses
            ],
        },
    )


def _courses(runs: Sequence[Run], first: int) -> list[Course]:
    """Colours tell trainings apart or, where there are several attributions, those."""
    found = []
    for place, run in enumerate(runs):
        trainings = by_training(run.loaded.points)
        for position, (name, points) in enumerate(trainings.items()):
            alone = len(trainings) == 1
            number = first + place if alone or len(runs) > 1 else first + 1 + position
            label = name if len(runs) == 1 else run.label if alone else f"{run.label}, {name}"
            found.append(Course(number, place, label, name, points))
    return found


def _trainings(runs: Sequence[Run], courses: Sequence[Course]) -> list[tuple[Course, Run]]:
    """r by layer of each training alone, where its attribution pools several."""
    several = [course for course in courses if len(course.points) < len(runs[course.run].loaded.points)]
    alone = [
        LoadedRun(f"{runs[course.run].label}, {course.training}", correlations(course.points)) for course in several
    ]
    return list(zip(several, open_runs(alone), strict=True)) if several else []


def _curve(panel: Panel, runs: Sequence[Run], trainings: Sequence[tuple[Course, Run]], first: int) -> Panel:
    """r by layer as the page's other curves are drawn, with the trainings that it pools as thin lines below."""
    series = Series("attribution", panel.target)
    parts = [(course, run) for course, run in trainings if series in run.curves]
    thin = [{**line_of(course.number, run, series, "part"), "name": course.label} for course, run in parts]
    (view,) = panel.views
    lines = [*thin, *({**line, "run": line["run"] + first, "solid": True} for line in view["lines"])]
    return replace(
        panel,
        id=_id(panel),
        views=[{**view, "lines": lines}],
        csv=csv_of([*runs, *(run for _, run in parts)], [series]),
    )


def _id(panel: Panel) -> str:
    return panel.id.removeprefix("attribution-")  # of section and metric alike


def _scatter(
    runs: Sequence[Run], courses: Sequence[Course], target: str, id: str, layers: Sequence[int], layer: int
) -> Scatter:
    known = [[point.told for point in course.points] for course in courses]
    rows = [[[told.get((target, layer)) for told in course] for course in known] for layer in layers]
    name = next((row.metric for of in rows for course in of for row in course if row), "probe_accuracy")
    told = [_r(runs, target, layer) for layer in layers]
    opening = rows[layers.index(layer)]
    levels = [point.chance(target) for course in courses for point in course.points if name != FIDELITY]
    return Scatter(
        id=f"{id}-checkpoints",
        title=target if name != FIDELITY else metric(name).title,
        help=metric(name).help,
        told=told[layers.index(layer)],
        csv=_csv(runs, courses, target),
        numbers=[
            (course.label, point.name, _written(point.skill), _written(row))
            for course, of in zip(courses, opening, strict=True)
            for point, row in zip(course.points, of, strict=True)
        ],
        data={
            "scatter": True,
            "percent": metric(name).percent,
            "title": metric(name).title.lower(),
            "chance": next((level for level in levels if level is not None), None),
            "told": told,
            "x": [[[row and row.value for row in of] for of in by_course] for by_course in rows],
            "text": [[[_written(row) for row in of] for of in by_course] for by_course in rows],
        },
    )


def _written(row: Measurement | None) -> str:
    return "–" if row is None else write_value(row)


def _r(runs: Sequence[Run], target: str, layer: int) -> str:
    """ "r = −0.81 [−0.95, −0.40], 3 seeds", of every attribution."""
    texts = []
    for run in runs:
        row = run.at(Series("attribution", target), layer)
        if row is None:
            text = "not measured"
        elif row.value is None:
            text = f"no r: {row.note}"
        else:
            text = f"r = {_written(row)}, {row.n} {row.unit}"
        texts.append(text if len(runs) == 1 else f"{run.label}: {text}")
    return "; ".join(texts)


def _csv(runs: Sequence[Run], courses: Sequence[Course], target: str) -> str:
    """Every point at every layer, with its skill."""
    names = ("value", "low", "high", "n")
    columns = ["run", "training", "checkpoint", *(f"skill_{name}" for name in names), *Measurement.__dataclass_fields__]
    lines: list[dict[str, Any]] = []
    for course in courses:
        for point in course.points:
            skill = {f"skill_{name}": getattr(point.skill, name, None) for name in names}
            place = {"run": runs[course.run].label, "training": course.training, "checkpoint": point.name}
            lines += [place | skill | asdict(row) for (of, _), row in point.told.items() if of == target]
    return csv_uri(columns, lines)
