"""A task that stands alone in one run, and beside others in another run, is the same task in both."""

from collections.abc import Sequence
from dataclasses import replace

from keepsight.results.answers import target_of
from keepsight.results.loaded import LoadedRun
from keepsight.results.per_image import PerImage

ANSWER_METRICS = ("answer_accuracy", "answer_prior", "answer_f1", "answer_yes", "pair_accuracy")  # metrics of answers


def tasks_named(runs: Sequence[LoadedRun]) -> list[LoadedRun]:
    """The runs, whose rows of answers name a lone task ("" in the rows) where another run asked it beside others."""
    asked = [list(dict.fromkeys(answer.task for answer in run.answers)) for run in runs]
    beside_others = {task for tasks in asked if len(tasks) > 1 for task in tasks}
    return [
        _named(run, tasks[0]) if len(tasks) == 1 and tasks[0] in beside_others and _unnamed(run) else run
        for run, tasks in zip(runs, asked, strict=True)
    ]


def _unnamed(run: LoadedRun) -> bool:
    return any(row.metric in ANSWER_METRICS and row.target == "" for row in run.rows)


def _named(run: LoadedRun, task: str) -> LoadedRun:
    def target(metric: str, kind: str) -> str:
        return target_of(task, kind, 2) if metric in ANSWER_METRICS else kind

    rows = [replace(row, target=target(row.metric, row.target)) for row in run.rows]
    kept = run.per_image
    if kept is not None:
        keys = [key._replace(target=target(key.metric, key.target)) for key in kept.keys]
        kept = PerImage(kept.images, keys, kept.values)
    return replace(run, rows=rows, per_image=kept)
