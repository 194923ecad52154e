"""The paper's benchmarks and figures (`paper.json`), and a run's numbers beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from keepsight.pre.config import PReConfig
from keepsight.results import Measurement

WEIGHT = 0.5  # the paper's λ
PART = "the first "  # begins the note on a benchmark of which only a part was asked


@dataclass(frozen=True)
class Benchmark:
    """One of the nine.

    Attributes:
        name: as the paper writes it. task: lmms-eval's. metric: that of its numbers which the paper quotes.
        scale: the metric times this is in the paper's unit: 100 = percent, 1000 = OCRBench's points.
        paper: whether the paper has figures of it.
        kind: what the task calls the kind of a question.
        recorded_as: what results call the task where it is not what its name says.
        note: what must be told beside every number of it.
    """

    name: str
    task: str
    metric: str
    scale: float
    paper: bool
    kind: str = ""
    recorded_as: str = ""
    note: str = ""


@dataclass(frozen=True)
class Configuration:
    """A line of the paper's tables. pre: settings of PRe that make it, each a value or those that mean the same; None
    without PRe."""

    name: str
    vision: str
    language: str
    pre: Mapping[str, Any] | None
    values: Mapping[str, float]


@dataclass(frozen=True)
class Line:
    """A benchmark: here (value, low, high in the paper's unit; None if not run in full), the paper's value, notes."""

    benchmark: str
    here: float | None
    low: float | None
    high: float | None
    paper: float | None
    note: str = ""


@cache
def _told() -> dict[str, Any]:
    return json.loads(files(__package__).joinpath("paper.json").read_text(encoding="utf-8"))


def benchmarks() -> list[Benchmark]:
    """The nine, in the paper's order; POPE last."""
    return [Benchmark(**entry) for entry in _told()["benchmarks"]]


def benchmark(task: str) -> Benchmark | None:
    """The one that lmms-eval calls so."""
    return next((one for one in benchmarks() if one.task == task), None)


def configurations() -> list[Configuration]:
    """Those of which the paper gives figures."""
    return [Configuration(**entry) for entry in _told()["configurations"]]


def about() -> list[str]:
    """Where the figures come from, and why numbers here may differ from them."""
    return [_told()["source"], _told()["differs"]]


def configuration_of(run: str | Path) -> Configuration | None:
    """The paper's configuration that a `keepsight train` run (or its `model`) trained, from its config.yaml; None for
    another one or no run.

    Encoder and language model by name, λ = 0 or the paper's, its layer and anchor, everything else of PRe as the paper
    has it. Data, stages and learning rates are not compared.
    """
    folder = Path(run)
    file = next((f for f in (folder / "config.yaml", folder.parent / "config.yaml") if f.is_file()), None)
    if file is None:
        return None
    try:
        told = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    if not isinstance(told, Mapping) or not isinstance(told.get("model"), Mapping):
        return None
    return next((one for one in configurations() if _is(one, told["model"], told.get("pre") or {})), None)


def _is(one: Configuration, model: Mapping[str, Any], pre: Mapping[str, Any]) -> bool:
    named = [str(model.get(name) or "").lower() for name in ("vision", "language")]
    if one.vision not in named[0] or one.language not in named[1]:
        return False
    weight = pre.get("weight", WEIGHT)
    if one.pre is None or weight == 0:
        return one.pre is None and weight == 0
    told = {field.name: pre.get(field.name, field.default) for field in fields(PReConfig)}
    free = {"weight", "seed", "head_lr", "hidden", "anchor_layer", "anchor_decay", "temperature", *one.pre}
    usual = all(told[field.name] == field.default for field in fields(PReConfig) if field.name not in free)
    return weight == WEIGHT and usual and all(_fits(told[name], wanted) for name, wanted in one.pre.items())


def _fits(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, list) else str(wanted) in str(value)


def compare(rows: Sequence[Measurement], configuration: Configuration | None) -> list[Line]:
    """The benchmarks that were run, beside the paper's figures.

    A number on other labels than the paper's (MMVP) stands beside no figure of the paper: it has a line of its own. Nor
    does one of a part of the questions.
    """
    lines = []
    for one in benchmarks():
        name = one.recorded_as or one.task
        row = next((r for r in rows if (r.metric, r.target, r.variant) == ("harness_score", name, one.metric)), None)
        quoted = None if configuration is None else configuration.values.get(one.name)
        marked = bool(one.recorded_as)
        if marked and quoted is not None:
            lines.append(Line(one.name, None, None, None, quoted, "original labels, which lmms-eval does not have"))
        if row is None or row.value is None:
            if not marked and quoted is not None:
                lines.append(Line(one.name, None, None, None, quoted, "not run"))
            continue
        here, low, high = (None if number is None else number * one.scale for number in (row.value, row.low, row.high))
        title = f"{one.name} ({name})" if marked else one.name
        whole = PART not in row.note
        lines.append(Line(title, here, low, high, quoted if whole and not marked else None, row.note))
    return lines
