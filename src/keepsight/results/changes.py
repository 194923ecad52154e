"""Two runs on the same questions: the paired difference, and which questions one gets right and the other wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from keepsight.results.answers import AnswerRecord, clusters, target_of
from keepsight.results.intervals import Estimate, bootstrap_ratio

Pair = tuple[AnswerRecord, AnswerRecord]  # the same question in the first run and in the second


@dataclass(frozen=True)
class Change:
    """Of all questions of one target (a type, or "" for all) that both runs answered.

    before, after: mean scores; difference: after − before with a bootstrap interval over clusters; only_before,
    only_after: the questions that only one of the two gets right, McNemar's (1947) discordant counts; elsewhere:
    questions that only one of the runs answered.
    """

    target: str
    task: str
    type: str
    questions: int
    before: float
    after: float
    difference: Estimate
    only_before: list[Pair]
    only_after: list[Pair]
    elsewhere: int


def changes(before: Sequence[AnswerRecord], after: Sequence[AnswerRecord]) -> list[Change]:
    """Every target, a task's whole before its types; empty where the runs share no question."""
    return _changes(tuple(before), tuple(after))


@lru_cache(maxsize=16)  # the terminal's table, the verdict and the page ask for the same
def _changes(before: tuple[AnswerRecord, ...], after: tuple[AnswerRecord, ...]) -> list[Change]:
    first, second = ([record for record in run if record.score is not None] for run in (before, after))
    tasks = [list(dict.fromkeys(record.task for record in run)) for run in (first, second)]
    alone = len(tasks[0]) == len(tasks[1]) == 1  # one task in each is the same one, whatever its file is called
    there = {_key(record, alone): record for record in second}
    asked = [Counter(_groups(first, False)), Counter(_groups(second, alone, tasks[0][:1]))]
    pairs: dict[tuple[str, str], list[Pair]] = {}
    for record in first:
        if (other := there.get(_key(record, alone))) is not None:
            for group in _groups([record], False):
                pairs.setdefault(group, []).append((record, other))
    order = sorted(pairs, key=lambda group: (tasks[0].index(group[0]), group[1]))
    return [
        _change(target_of(*group, len(tasks[0])), group, pairs[group], sum(count[group] for count in asked))
        for group in order
    ]


def answer_difference(
    before: Sequence[AnswerRecord], after: Sequence[AnswerRecord], target: str = ""
) -> Estimate | None:
    """The paired difference of the mean scores of one target; None unless both answered exactly the same questions."""
    # A task that stands alone may be named in the rows, or not.
    names = ((change, (change.target, target_of(change.task, change.type, 2))) for change in changes(before, after))
    found = next((change for change, both in names if target in both), None)
    return found.difference if found and not found.elsewhere else None


def _key(record: AnswerRecord, alone: bool) -> tuple[object, ...]:
    return "" if alone else record.task, record.id, record.question, record.reference


def _groups(records: Sequence[AnswerRecord], alone: bool, task: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """(task, type) of each, and (task, "") for all types together."""
    for record in records:
        for kind in dict.fromkeys(("", record.type)):
            yield task[0] if alone else record.task, kind


def _change(target: str, group: tuple[str, str], pairs: list[Pair], asked: int) -> Change:
    return Change(
        target,
        *group,
        len(pairs),
        float(np.mean([one.score for one, _ in pairs])),
        float(np.mean([other.score for _, other in pairs])),
        _difference(pairs),
        [pair for pair in pairs if pair[0].correct and not pair[1].correct],
        [pair for pair in pairs if pair[1].correct and not pair[0].correct],
        asked - 2 * len(pairs),
    )


def _difference(pairs: Sequence[Pair]) -> Estimate:
    gained = np.array([(other.score or 0.0) - (one.score or 0.0) for one, other in pairs])
    records = [one for one, _ in pairs]
    names = clusters([r.picture for r in records], [r.pair for r in records], [r.id for r in records])
    place = {name: number for number, name in enumerate(dict.fromkeys(names))}
    columns = np.array([place[name] for name in names])
    return bootstrap_ratio(np.bincount(columns, weights=gained), np.bincount(columns).astype(float))
