"""The few numbers that decide: what a run lost by its middle layer, or how two runs differ there."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from keepsight.report.curves import Run, Series, target_groups, targets_of
from keepsight.report.metrics import write_difference
from keepsight.results import Measurement, intervals
from keepsight.results.changes import answer_difference
from keepsight.results.intervals import Estimate
from keepsight.results.points import FIDELITY

Rows = tuple[Measurement | None, Measurement | None]
WITHOUT = "without sinks"


@dataclass(frozen=True)
class Finding:
    """One number with an interval that either contains zero or does not."""

    metric: str  # "probe_drop", "probe_accuracy", "gap", "fidelity" or "answer_accuracy"
    label: str  # what it is of: a target, "gap", "answers", "answers to" a task
    value: float | None
    low: float | None
    high: float | None
    group: str = ""  # "asked", "never asked" or not declared
    before: Measurement | None = None
    after: Measurement | None = None
    caveat: str = ""  # said with it: what changes without sinks, or why there is no value

    @property
    def told(self) -> bool:
        """Whether the 95 % interval leaves zero out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def text(self) -> str:
        """The number in words."""
        if self.value is None:
            return self.caveat
        if self.metric == "probe_drop":
            text = write_difference("probe_accuracy", self.value, self.low, self.high)
            return text.replace("points", "%")
        return write_difference(self.metric, self.value, self.low, self.high)


def difference(base: Run, before: Measurement, other: Run, after: Measurement) -> Estimate:
    """after − before with its 95 % interval: for answers to the same questions a bootstrap over pictures, else from the
    two intervals, in pairs where both runs kept what each picture adds."""
    if before.metric == "answer_accuracy":
        found = answer_difference(base.loaded.answers, other.loaded.answers, before.target)
        if found is not None and found.low is not None:
            return found
    kept = base.loaded.per_image, other.loaded.per_image
    return intervals.difference(before, after, intervals.correlation(before, after, *kept))


def within(run: Run) -> list[Finding]:
    """How one run changes from layer 0 to its middle layer: each probe (minus its drop) and the gap.

    Fidelity, which needs neither labels nor masks, where these have no value.
    """
    groups = target_groups([run])
    found = []
    for target in targets_of([run], "probe_drop"):
        series = run.headline("probe_drop", target)
        if series and (finding := _dropped(run, series, groups.get(target, ""))):
            found.append(_beside(finding, _dropped(run, series._replace(tokens=WITHOUT))))

    def rows_at(series: Series) -> Rows:
        return run.at(series, 0), run.at(series, run.middle)

    found = _by_group(found) + _gap(rows_at, (run, run))
    known = any(finding.value is not None for finding in found)
    return found if known else found + _change(Series(FIDELITY), rows_at, (run, run), FIDELITY)


def _dropped(run: Run, series: Series, group: str = "") -> Finding | None:
    row = run.at(series, run.middle) or run.at(series, None)
    if row is None:
        return None
    value, low, high = (None if end is None else -end for end in (row.value, row.high, row.low))
    return Finding("probe_drop", series.target or "class", value, low, high, group, after=row, caveat=row.note)


def between(base: Run, other: Run) -> list[Finding]:
    """How `other` differs from `base`, each at its own middle layer: probes, gap, and answers.

    Fidelity where they share neither probe nor gap.
    """
    runs = base, other
    groups = target_groups(runs)

    def rows_at(series: Series) -> Rows:
        return base.at(series, base.middle), other.at(series, other.middle)

    found = []
    for target in targets_of([base], "probe_accuracy"):
        series = base.headline("probe_accuracy", target)
        if series:
            found += _change(series, rows_at, runs, target or "class", groups.get(target, ""))
    found = _by_group(found) + _gap(rows_at, runs)
    found = found or _change(Series(FIDELITY), rows_at, runs, FIDELITY)
    for target in tasks_of(base):
        answers = Series("answer_accuracy", target)
        if pair := _pair(base.at(answers, None), other.at(answers, None)):
            label = f"answers to {target}" if target else "answers"
            found.append(_compared("answer_accuracy", label, runs, pair))
    return found


def tasks_of(run: Run) -> list[str]:
    """Targets of the answers to whole tasks: "", or with several tasks their names, without those of types."""
    targets = targets_of([run], "answer_accuracy")
    return [""] if "" in targets else [t for t in targets if not any(t.startswith(f"{other}, ") for other in targets)]


def _by_group(found: list[Finding]) -> list[Finding]:
    order = {"never asked": 0, "asked": 1}
    return sorted(found, key=lambda finding: order.get(finding.group, 2))


def _pair(before: Measurement | None, after: Measurement | None) -> tuple[Measurement, Measurement] | None:
    return (before, after) if before and after and None not in (before.value, after.value) else None


def _compared(
    metric: str,
    label: str,
    runs: tuple[Run, Run],
    pair: tuple[Measurement, Measurement],
    group: str = "",
) -> Finding:
    (base, other), (before, after) = runs, pair
    found = difference(base, before, other, after)
    return Finding(metric, label, found.value, found.low, found.high, group, before, after)


def _gap(rows_at: Callable[[Series], Rows], runs: tuple[Run, Run]) -> list[Finding]:
    series = runs[0].headline("gap")
    return _change(series, rows_at, runs, f"{series.variant} gap".strip()) if series else []


def _change(
    series: Series, rows_at: Callable[[Series], Rows], runs: tuple[Run, Run], label: str, group: str = ""
) -> list[Finding]:
    """What `rows_at` gives for the series, compared; with a caveat where leaving the sinks out decides otherwise."""
    pair, without = _pair(*rows_at(series)), _pair(*rows_at(series._replace(tokens=WITHOUT)))
    if not pair:
        return []
    finding = _compared(series.metric, label, runs, pair, group)
    return [_beside(finding, _compared(series.metric, label, runs, without) if without else None)]


def _beside(finding: Finding, without: Finding | None) -> Finding:
    """The finding, and what it is without sinks where that decides otherwise."""
    if without is None or _direction(without) == _direction(finding):
        return finding
    return replace(finding, caveat="; ".join(filter(None, [finding.caveat, f"{WITHOUT} {without.text}"])))


def _direction(finding: Finding) -> int:
    return int(math.copysign(1, finding.value)) if finding.told and finding.value else 0
