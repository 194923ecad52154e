"""Rows → the data of the interactive figures: plain dictionaries that report.js draws."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keepsight.report.csv_links import csv_of
from keepsight.report.curves import Run, Series, target_groups, targets_of
from keepsight.report.metrics import (
    ASKED,
    DASHES,
    GROUP_TITLES,
    NEVER_ASKED,
    PARTS,
    PARTS_TITLE,
    PREFERRED_VARIANTS,
    Section,
    control_of,
    dash_of,
    metric,
    preferred,
    write_interval,
    write_number,
    write_sample,
)
from keepsight.results import Measurement

LAYER = "layer"  # what the horizontal axis of most figures tells
OPEN = 9  # figures of a group that are open to the eye; further ones are folded away


@dataclass(frozen=True)
class Panel:
    """One figure. `views` has a set of lines for every (variant, tokens) that the selectors can ask for."""

    id: str
    metric: str
    target: str
    title: str
    help: str
    percent: bool
    shared: bool  # whether it shares its vertical range with the other panels of its section
    views: list[dict[str, Any]]
    gaps: str  # which layers have no value, and why
    csv: str  # a data URI
    sample: str  # n and seed where they are the same at every layer of the opening view
    numbers: list[dict[str, Any]]  # the opening view as a table: where on the axis, and one text a run
    axis: str = LAYER

    @property
    def data(self) -> dict[str, Any]:
        """What report.js draws it from."""
        return {"percent": self.percent, "shared": self.shared, "axis": self.axis, "views": self.views}


@dataclass(frozen=True)
class Group:
    """Panels under one heading: probes of what was asked, for instance."""

    title: str
    panels: list[Panel]


@dataclass(frozen=True)
class Choice:
    """A selector of variants: those of figures that share some, best first; `title` names the figures where others
    have a selector of their own."""

    title: str
    variants: list[str]


@dataclass(frozen=True)
class Figures:
    """A section with everything it draws, and what its selectors offer."""

    section: Section
    groups: list[Group]
    more: list[Group]  # folded away
    choices: list[Choice]
    tokens: list[str]

    @property
    def controls(self) -> list[str]:
        """The thin lines, "shuffled labels (dotted)", in the order of their first figure."""
        lines = (line for panel in self.panels for view in panel.views for line in view["lines"])
        names = dict.fromkeys(line["name"] for line in lines if line["role"] == "control")
        # "raw, random weights" and "centred, random weights" are one control, each beside its own.
        alone = dict.fromkeys(name.removeprefix(f"{control_of(name)}, ") for name in names)
        return [f"{name} ({DASHES[dash_of(name)]})" for name in alone]

    @property
    def panels(self) -> list[Panel]:
        return [panel for group in (*self.groups, *self.more) for panel in group.panels]


def draw_section(runs: Sequence[Run], section: Section) -> Figures | None:
    """The figures of a section; None if no run has a curve for it."""
    targets = target_groups(runs)
    grouped: dict[str, list[Panel]] = {}
    folded: list[Panel] = []
    parts: list[Panel] = []  # of the section's first metric alone: there may be twenty classes
    for name in section.metrics + section.more:
        for target in _layered_targets(runs, name):
            if target.startswith(PARTS):
                parts += [_panel(runs, section, name, target)] if name == section.metrics[0] else []
            elif name in section.folded + section.more:
                folded.append(_panel(runs, section, name, target))
            else:
                grouped.setdefault(targets.get(target, ""), []).append(_panel(runs, section, name, target))
    folded = [panel for group in grouped.values() for panel in group[OPEN:]] + folded
    grouped = {name: group[:OPEN] for name, group in grouped.items()}
    if not grouped and folded:
        grouped, folded = {"": folded}, []
    more = [Group(title, group) for title, group in ((section.more_title, folded), (PARTS_TITLE, parts)) if group]
    if not grouped and not more:
        return None
    groups = in_groups(grouped)
    panels = [panel for group in (*groups, *more) for panel in group.panels]
    return Figures(section, groups, more, _choices(panels), _tokens(panels))


def in_groups(grouped: Mapping[str, list[Panel]]) -> list[Group]:
    """Group → panels, what was never asked about first."""
    order = [group for group in (NEVER_ASKED, ASKED) if group in grouped]
    order += [group for group in grouped if group not in order]
    return [Group(GROUP_TITLES.get(group, group), grouped[group]) for group in order]


def _tokens(panels: Sequence[Panel]) -> list[str]:
    """All tokens, and the parts of them that any figure tells something else of: without sinks there may be none."""
    found = {"all": True}
    for panel in panels:
        whole = {view["variant"]: view["lines"] for view in panel.views if view["tokens"] == "all"}
        for view in panel.views:
            differs = view["lines"] != whole.get(view["variant"])
            found[view["tokens"]] = found.get(view["tokens"], False) or differs
    return [tokens for tokens, differs in found.items() if differs]


def _choices(panels: Sequence[Panel]) -> list[Choice]:
    """A selector for each set of figures that have variants in common: no choice may be one that few figures know."""
    found: list[tuple[set[str], list[str]]] = []
    for panel in panels:
        variants, titles = {view["variant"] for view in panel.views} - {""}, [metric(panel.metric).title]
        for other in [item for item in found if item[0] & variants]:
            found.remove(other)
            variants, titles = variants | other[0], other[1] + titles
        found.append((variants, titles))
    offered = [(variants, titles) for variants, titles in found if len(variants) > 1]
    most = max((len(titles) for _, titles in offered), default=0)
    choices = []
    for variants, titles in offered:
        ranked = [variant for variant in PREFERRED_VARIANTS if variant in variants]
        title = "Variant" if len(titles) == most else ", ".join(dict.fromkeys(titles))
        choices.append(Choice(title, ranked + sorted(variants - set(ranked))))
    return sorted(choices, key=lambda choice: choice.title != "Variant")


def _layered_targets(runs: Sequence[Run], name: str) -> list[str]:
    """Targets of a metric that have a curve, not only a number of the whole model."""
    return [
        target
        for target in targets_of(runs, name)
        if any(
            layer is not None
            for run in runs
            for series in run.select(name)
            if series.target == target
            for layer in run.curves[series]
        )
    ]


def _panel(runs: Sequence[Run], section: Section, name: str, target: str) -> Panel:
    shown = metric(name)
    every = list(dict.fromkeys(s for run in runs for s in run.select(name) if s.target == target))
    controls = [series for series in every if control_of(series.variant) is not None]
    main = [series for series in every if series not in controls] or controls
    views = []
    for series in main:
        lines = [line_of(number, run, series, "run") for number, run in enumerate(runs) if series in run.curves]
        lines += [
            {**line_of(number, run, control, "control"), "name": control.variant, "dash": dash_of(control.variant)}
            for control in controls
            if control.tokens == series.tokens
            and control != series
            and control_of(control.variant) in ("", series.variant)
            for number, run in enumerate(runs)
            if control in run.curves
        ]
        if name == "probe_accuracy":
            lines += chance(runs, target, series.tokens)
        views.append({"variant": series.variant, "tokens": series.tokens, "lines": lines})
    opening = next((run.headline(name, target) for run in runs if run.headline(name, target)), main[0])
    assert opening is not None
    return Panel(
        metric=name,
        target=target,
        id="-".join((section.id, name, str(targets_of(runs, name).index(target)))),
        title=target or shown.title if name == "probe_accuracy" else ", ".join(filter(None, [shown.title, target])),
        help=shown.help,
        percent=shown.percent,
        shared=name == "probe_accuracy",
        views=sorted(views, key=lambda view: (view["tokens"] != "all", view["variant"] != preferred_of(views))),
        gaps=_missing(runs, main),
        csv=csv_of(runs, every),
        sample=_sample(runs, opening),
        numbers=_numbers(runs, opening),
    )


def preferred_of(views: Sequence[dict[str, Any]]) -> str:
    """The variant that a panel opens with."""
    return preferred({view["variant"] for view in views})


def line_of(number: int, run: Run, series: Series, role: str) -> dict[str, Any]:
    """A series of a run as report.js draws it; the run is told by its `number`."""
    return line_of_points(
        number, sorted((layer, row) for layer, row in run.curves[series].items() if layer is not None), role
    )


def line_of_points(number: int, points: Sequence[tuple[float, Measurement]], role: str) -> dict[str, Any]:
    """The same of rows at any places of the axis."""
    rows = [row for _, row in points]
    return {
        "run": number,
        "role": role,
        "x": [place for place, _ in points],
        "y": [row.value for row in rows],
        "low": [row.low if row.low is not None else row.value for row in rows],
        "high": [row.high if row.high is not None else row.value for row in rows],
        "text": [_number(row) for row in rows],
        "sample": [write_sample(row) for row in rows],
    }


def _number(row: Measurement) -> str:
    parts = (write_number(row.metric, row.value), write_interval(row.metric, row.low, row.high))
    return "  ".join(part for part in parts if part)


def told(row: Measurement) -> str:
    """A row's number, interval and sample."""
    return "  ".join(part for part in (_number(row), write_sample(row)) if part)


def chance(runs: Sequence[Run], target: str, tokens: str, end: int | None = None) -> list[dict[str, Any]]:
    """A flat line at chance level, to the last layer or the `end` given; one for all runs where they agree."""
    levels: dict[float, dict[str, Any]] = {}
    for number, run in enumerate(runs):
        for series in run.select("probe_chance"):
            if series.target != target or series.tokens not in ("all", tokens):
                continue
            for row in run.curves[series].values():
                if row.value is not None and row.value not in levels:
                    ends = {"x": [0, run.depth if end is None else end], "y": [row.value] * 2}
                    levels[row.value] = {"run": number, "role": "chance", **ends}
    return list(levels.values())


def _missing(runs: Sequence[Run], series: Sequence[Series]) -> str:
    """ "contrast has no value at layers 3, 4: coupling is near zero" """
    reasons: dict[str, list[int]] = {}
    for run in runs:
        for item in series:
            for layer, row in run.curves.get(item, {}).items():
                if layer is not None and row.value is None:
                    reasons.setdefault(row.note, []).append(layer)
    return "; ".join(
        f"no value at layer {', '.join(str(layer) for layer in sorted(set(layers)))}: {reason}"
        for reason, layers in reasons.items()
    )


def _numbers(runs: Sequence[Run], series: Series) -> list[dict[str, Any]]:
    layers = sorted({layer for run in runs for layer in run.curves.get(series, {}) if layer is not None})
    return [
        {"place": layer, "cells": [told(row) if (row := run.at(series, layer)) else "–" for run in runs]}
        for layer in layers
    ]


def _sample(runs: Sequence[Run], series: Series) -> str:
    """ "n = 600 images, seed 0", or nothing where it differs between layers or runs (hovering tells it there)."""
    return sample_of(row for run in runs for row in run.curves.get(series, {}).values())


def sample_of(rows: Iterable[Measurement]) -> str:
    """The sample of all these rows, or nothing where it differs."""
    samples = {write_sample(row) for row in rows}
    return samples.pop() if len(samples) == 1 else ""
