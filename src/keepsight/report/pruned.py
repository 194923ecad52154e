"""Figures of what probes still read by the share of visual tokens kept, beside the sections of curves by layer."""

import re
from collections.abc import Sequence
from typing import Any

from keepsight.report.csv_links import csv_of_rows
from keepsight.report.curves import Run, Series, target_groups, targets_of
from keepsight.report.metrics import SECTIONS, Section, dash_of, metric
from keepsight.report.panels import (
    Choice,
    Figures,
    Panel,
    chance,
    draw_section,
    in_groups,
    line_of_points,
    sample_of,
    told,
)
from keepsight.results import Measurement

PRUNED = "probe_accuracy_pruned"
KEPT = "visual tokens kept (%)"
_VARIANT = re.compile(r"(?P<by>\w+), (?P<kept>[\d.e+-]+)% (?P<where>after layer \d+)(, (?P<control>.+))?")

Points = dict[tuple[str, str], list[tuple[float, Measurement]]]  # (how pruned, the control or "") → share in %, row


def draw_sections(runs: Sequence[Run]) -> list[Figures]:
    """Every section of which the runs have a figure."""
    drawn = (_draw_pruned(runs, s) if PRUNED in s.metrics else draw_section(runs, s) for s in SECTIONS)
    return [figures for figures in drawn if figures]


def _draw_pruned(runs: Sequence[Run], section: Section) -> Figures | None:
    """A figure for each label set, a view for each way of pruning and layer that is read."""
    groups: dict[str, list[Panel]] = {}
    for number, target in enumerate(targets_of(runs, PRUNED)):
        points = [_points(run, target) for run in runs]
        if any(points):
            panel = _panel(runs, points, target, f"{section.id}-{PRUNED}-{number}")
            groups.setdefault(target_groups(runs).get(target, ""), []).append(panel)
    if not groups:
        return None
    found = in_groups(groups)
    variants = list(dict.fromkeys(view["variant"] for group in found for panel in group.panels for view in panel.views))
    return Figures(section, found, [], [Choice("Pruned", variants)] if len(variants) > 1 else [], ["all"])


def _points(run: Run, target: str) -> Points:
    """By rising share; at 100 % the probe without pruning."""
    found: Points = {}
    places: dict[int | None, str] = {run.depth: "the last", run.middle: "the middle layer"}
    for series in run.select(PRUNED):
        read = _VARIANT.fullmatch(series.variant)
        if series.target != target or not read:
            continue
        control = read["control"] or ""
        for layer, row in run.curves[series].items():
            how = f"{read['by']} {read['where']}, read at {places.get(layer, f'layer {layer}')}"
            points = found.setdefault((how, control), _unpruned(run, Series("probe_accuracy", target, control), layer))
            points.append((float(read["kept"]), row))
    return {key: sorted(dict(points).items()) for key, points in found.items()}


def _unpruned(run: Run, series: Series, layer: int | None) -> list[tuple[float, Measurement]]:
    row = run.at(series, layer)
    return [(100.0, row)] if row else []


def _panel(runs: Sequence[Run], points: Sequence[Points], target: str, name: str) -> Panel:
    variants = list(dict.fromkeys(how for each in points for how, control in each if not control))
    opening = [dict(each.get((variants[0], ""), [])) for each in points]
    return Panel(
        id=name,
        metric=PRUNED,
        target=target,
        title=target or metric(PRUNED).title,
        help=metric(PRUNED).help,
        percent=True,
        shared=True,
        views=[_view(runs, points, target, variant) for variant in variants],
        gaps="",
        csv=csv_of_rows(
            (run, row) for run, each in zip(runs, points, strict=True) for line in each.values() for _, row in line
        ),
        sample=sample_of(row for line in opening for row in line.values()),
        numbers=[
            {"place": f"{share:g}", "cells": [told(line[share]) if share in line else "–" for line in opening]}
            for share in sorted({share for line in opening for share in line})
        ],
        axis=KEPT,
    )


def _view(runs: Sequence[Run], points: Sequence[Points], target: str, variant: str) -> dict[str, Any]:
    lines = [
        line_of_points(number, line, "control" if control else "run")
        | ({"name": control, "dash": dash_of(control)} if control else {})
        for number, each in enumerate(points)
        for (how, control), line in each.items()
        if how == variant
    ]
    return {"variant": variant, "tokens": "all", "lines": lines + chance(runs, target, "all", 100)}
