"""A run's rows, ordered for reading: by metric and target, then by layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from keepsight.report.metrics import preferred
from keepsight.results import LoadedRun, Measurement, RunDirectory
from keepsight.results.tasks import tasks_named


class Series(NamedTuple):
    """What a curve is of."""

    metric: str
    target: str = ""
    variant: str = ""
    tokens: str = "all"


@dataclass(frozen=True)
class Run:
    """A run with its rows by series and layer; layer None holds numbers of the whole model."""

    loaded: LoadedRun
    curves: Mapping[Series, Mapping[int | None, Measurement]]

    @property
    def label(self) -> str:
        return self.loaded.label

    @property
    def depth(self) -> int:
        """L, from run.json or else the highest layer among the rows."""
        stated = self.loaded.info.get("depth")
        layers = [layer for curve in self.curves.values() for layer in curve if layer is not None]
        return int(stated) if stated is not None else max(layers, default=0)

    @property
    def middle(self) -> int:
        return self.depth // 2

    @property
    def pre_layer(self) -> int | None:
        return self.loaded.info.get("pre_layer")

    def at(self, series: Series, layer: int | None) -> Measurement | None:
        """The row of `series` at `layer`, if there is one."""
        return self.curves.get(series, {}).get(layer)

    def select(self, metric: str) -> list[Series]:
        """All series of a metric, in the order of the rows."""
        return [series for series in self.curves if series.metric == metric]

    def headline(self, metric: str, target: str = "", tokens: str = "all") -> Series | None:
        """The series of a metric that tables and verdict speak of: its preferred variant."""
        variants = {s.variant for s in self.select(metric) if s.target == target and s.tokens == tokens}
        return Series(metric, target, preferred(variants), tokens) if variants else None


def open_runs(runs: Sequence[RunDirectory | LoadedRun]) -> list[Run]:
    """Read and index runs; the first is what the others are compared with.

    Raises:
        ValueError: if there are none, or if one holds two rows for the same number.
    """
    if not runs:
        raise ValueError("a report needs at least one run; got none")
    loaded = [run.load() if isinstance(run, RunDirectory) else run for run in runs]
    return [_index(run) for run in tasks_named(loaded)]


def apart(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """The runs of one model each, and the attributions, which are of whole trainings; each in their order."""
    return [run for run in runs if not run.loaded.points], [run for run in runs if run.loaded.points]


def _index(loaded: LoadedRun) -> Run:
    curves: dict[Series, dict[int | None, Measurement]] = {}
    for row in loaded.rows:
        series = Series(row.metric, row.target, row.variant, row.tokens)
        curve = curves.setdefault(series, {})
        if row.layer in curve:
            raise ValueError(
                f"run '{loaded.label}' holds two rows for {series} at layer {row.layer}, with seeds "
                f"{curve[row.layer].seed} and {row.seed}; give every seed its own run"
            )
        curve[row.layer] = row
    return Run(loaded, curves)


def target_groups(runs: Sequence[Run]) -> dict[str, str]:
    """Label set → "asked" or "never asked", as the runs declare it; the first declaration holds."""
    groups: dict[str, str] = {}
    for run in runs:
        for target, group in (run.loaded.info.get("targets") or {}).items():
            groups.setdefault(target, group)
    return groups


def targets_of(runs: Sequence[Run], metric: str) -> list[str]:
    """The targets of a metric over all runs, in the order of the rows."""
    return list(dict.fromkeys(series.target for run in runs for series in run.select(metric)))
