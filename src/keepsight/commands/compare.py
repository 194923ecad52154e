"""`keepsight compare RUN RUN …`: runs side by side, their differences in pairs, and conditions for a pipeline."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

MET_STATUS = 1  # exit status where a condition is met
FAIL_IF = f"exit with status {MET_STATUS} where the condition (below) is met; may be given repeatedly"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command's settings."""
    parser = argparse.ArgumentParser(
        prog="keepsight compare",
        usage="keepsight compare RUN [RUN …] [--out REPORT.html] [--fail-if CONDITION …]",
        description="Compare runs of keepsight diagnose, evaluate or both; the first is what the others are compared "
        "with. Those of keepsight attribute are shown beside them. "
        "Of runs that answered the same questions the report shows those that only one gets right.",
        epilog="A diagnosis and an evaluation of the same weights and label are one run. Other runs with the same "
        "label are seeds of one arm: they are averaged, and intervals are over seeds. "
        "Conditions: METRIC OPERATOR NUMBER, such as 'probe_drop > 0.1', 'probe_drop[texture] > 0.1', "
        "'gap@16 < 0.05' or, for the difference from the first run, 'delta gap < -0.02'; met where the whole 95 % "
        f"interval is. Exit status {MET_STATUS} if one is met.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of keepsight diagnose, evaluate or attribute")
    parser.add_argument("--out", metavar="FILE", help="write one report, an .html file")
    parser.add_argument("--rows", metavar="FILE", help="write every difference, with all intervals, one JSON a line")
    parser.add_argument("--fail-if", action="append", default=[], metavar="CONDITION", help=FAIL_IF)
    return parser.parse_args(list(arguments) or ["--help"])


def main(arguments: Sequence[str]) -> int:
    """Print the table, the verdict and what became of the conditions; write what was asked for."""
    given = parse(arguments)
    from keepsight.results.gate import MET, Condition

    conditions = [Condition.parse(text) for text in given.fail_if]
    from keepsight.commands.console import console
    from keepsight.report import build, table, verdict
    from keepsight.report.changed import changed_table
    from keepsight.report.compare import differences, judge
    from keepsight.report.curves import open_runs
    from keepsight.results import RunDirectory, write_rows
    from keepsight.results.arms import arms, pool
    from keepsight.results.tasks import tasks_named

    for name in ("out", "rows"):
        if (file := getattr(given, name)) and not Path(file).parent.is_dir():
            raise ValueError(f"--{name} is '{file}', whose folder does not exist; create it, or choose another.")
    loaded = tasks_named([RunDirectory.open(folder).load() for folder in given.runs])
    attributions = [run for run in loaded if run.points]
    grouped = arms([run for run in loaded if not run.points])
    compared = [pool(runs) for runs in grouped]
    for runs in grouped:
        # Labels that nobody chose may agree by chance, such as "checkpoint-500" of two trainings.
        if len(runs) > 1:
            console.print(
                f"{runs[0].label}: {len(runs)} runs of this label are averaged as seeds of one arm; to compare them "
                "with one another, give each its own (keepsight diagnose --label).",
                markup=False,
            )
    pooled = [*compared, *attributions]
    for run in pooled:
        if not run.rows:
            commands = "`keepsight diagnose`, `evaluate` or `attribute`"
            raise ValueError(f"the run '{run.label}' holds no rows; give folders that {commands} wrote.")
    outcomes = [(text, *judge(condition, pooled)) for text, condition in zip(given.fail_if, conditions, strict=True)]
    if compared:
        console.print(table(compared))
        if (counts := changed_table(open_runs(compared))) is not None:
            console.print(counts)
        console.print(verdict(compared), markup=False)
    if attributions:
        console.print(table(attributions))
        console.print(verdict(attributions), markup=False)
    if given.rows:
        write_rows(given.rows, differences(grouped))
        console.print(f"differences: {given.rows}", markup=False)
    if given.out:
        console.print(f"report: {build(pooled, given.out)}", markup=False)
    for text, outcome, numbers in outcomes:
        console.print(f"{text}: {outcome}", style="bold red" if outcome == MET else "", markup=False)
        for number in numbers:
            console.print(f"  {number}", markup=False)
    return MET_STATUS if any(outcome == MET for _, outcome, _ in outcomes) else 0
