"""Figures of what probes still read by the share of visual tokens kept, beside the sections of curves by layer."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from keepsight.report.curves import Run, Series, target_groups, targets_of
from keepsight.report.metrics import GROUP_TITLES, SECTIONS, Section, metric
from keepsight.report.panels import Choice, Figures, Group, Panel, chance, csv_of, draw_section, line
from keepsight.results import Measurement

PRUNED = "probe_accuracy_pruned"
KEPT = "visual tokens kept (%)"
_VARIANT = re.compile(r"(?P<by>\w+), (?P<kept>[\d.]+)% (?P<where>after layer \d+)(, (?P<control>.+))?")

Point = tuple[float, Measurement]  # share kept in %, row


def draw_sections(runs: Sequence[Run]) -> list[Figures]:
    """Every section of which the runs have a figure."""
    drawn = (_draw_pruned(runs, s) if PRUNED in s.metrics else draw_section(runs, s) for s in SECTIONS)
    return [figures for figures in drawn if figures]


def _draw_pruned(runs: Sequence[Run], section: Section) -> Figures | None:
    """A figure for each label set, a view for each way of pruning and layer that is read."""
    groups: dict[str, list[Panel]] = {}
    for number, target in enumerate(targets_of(runs, PRUNED)):
        points = [_points(run, target) for run in runs]
        views = [
            {"variant": variant, "tokens": "all", "lines": _lines(runs, points, target, variant)}
            for variant in dict.fromkeys(variant for each in points for variant, control in each if not control)
        ]
        if views:
            panel = _panel(runs, section, target, views, f"{section.id}-{PRUNED}-{number}")
            groups.setdefault(target_groups(runs).get(target, ""), []).append(panel)
    if not groups:
        return None
    variants = list(dict.fromkeys(v["variant"] for group in groups.values() for panel in group for v in panel.views))
    choices = [Choice("Pruned", variants)] if len(variants) > 1 else []
    return Figures(
        section, [Group(GROUP_TITLES.get(g, g), panels) for g, panels in groups.items()], [], choices, ["all"]
    )


def _points(run: Run, target: str) -> dict[tuple[str, str], list[Point]]:
    """(how it is pruned and read, the control or "") → points by rising share; at 100 % the probe without pruning."""
    found: dict[tuple[str, str], list[Point]] = {}
    for series in run.select(PRUNED):
        told = _VARIANT.fullmatch(series.variant)
        if series.target != target or not told:
            continue
        control = told["control"] or ""
        for layer, row in run.curves[series].items():
            how = f"{told['by']} {told['where']}, read at layer {layer}"
            points = found.setdefault((how, control), _unpruned(run, Series("probe_accuracy", target, control), layer))
            points.append((float(told["kept"]), row))
    return {key: sorted(dict(points).items()) for key, points in found.items()}


def _unpruned(run: Run, series: Series, layer: int | None) -> list[Point]:
    row = run.at(series, layer)
    return [(100.0, row)] if row else []


def _lines(
    runs: Sequence[Run], points: Sequence[dict[tuple[str, str], list[Point]]], target: str, variant: str
) -> list[dict[str, Any]]:
    found = [
        {**line(number, rows, "control" if control else "run"), "name": control}
        for number, each in enumerate(points)
        for (how, control), rows in each.items()
        if how == variant
    ]
    return found + chance(runs, target, "all", 100)


def _panel(runs: Sequence[Run], section: Section, target: str, views: list[dict[str, Any]], name: str) -> Panel:
    every = list(dict.fromkeys(s for run in runs for s in run.select(PRUNED) if s.target == target))
    opening = {line["run"]: dict(zip(line["x"], line["text"], strict=True)) for line in _of_runs(views[0])}
    shares = sorted({share for line in opening.values() for share in line})
    return Panel(
        id=name,
        metric=PRUNED,
        target=target,
        title=target or metric(PRUNED).title,
        help=metric(PRUNED).help,
        percent=True,
        shared=True,
        views=views,
        gaps="",
        csv=csv_of(runs, every),
        sample="",
        numbers=[
            {"layer": f"{share:g}", "cells": [opening.get(number, {}).get(share, "–") for number in range(len(runs))]}
            for share in shares
        ],
        axis=KEPT,
    )


def _of_runs(view: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (line for line in view["lines"] if line["role"] == "run")
