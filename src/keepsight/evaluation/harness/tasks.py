"""One of lmms-eval's tasks, run: its questions as our records, its numbers as our rows."""

from __future__ import annotations

import contextlib
import hashlib
import io
from argparse import Namespace
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from keepsight.evaluation.harness.likelihood import by_likelihood, count_impossible, said_and_right
from keepsight.evaluation.harness.paper import PART, benchmark
from keepsight.evaluation.harness.result import Answered, TaskResult, record_of
from keepsight.evaluation.scoring import rows_of
from keepsight.images import ImageError, open_image
from keepsight.processes import rank, team, world_size
from keepsight.results import Measurement, make_folder, write_file
from keepsight.results.thumbnails import LONGEST_SIDE, MOST, encode, shrink

_RESAMPLES = 500
_SAME = 1e-5  # MMMU's accuracy is rounded to five decimals


class UnreachedError(ValueError):
    """A task that could not be run here; the text says why."""


def known_tasks(include_path: str | None = None) -> Any:
    """lmms-eval's task manager, its log silenced: that would drown the results."""
    from lmms_eval.tasks import TaskManager
    from loguru import logger

    logger.disable("lmms_eval")
    return TaskManager("ERROR", include_path=include_path, model_name="keepsight")


def run_task(
    lm: Any, task: str, manager: Any, out: Path, limit: int | None = None, pictures: Path | None = None
) -> list[TaskResult]:
    """Run a task (or a group of them) with one of lmms-eval's models, and read what it gave.

    Args:
        lm: `Chat` or any other model of lmms-eval.
        manager: from `known_tasks`.
        out: where lmms-eval writes its submission files.
        pictures: a folder for small copies of the pictures; without it none are kept.

    Returns:
        One a task, those of a group one by one; of several processes, in the first only.

    Raises:
        UnreachedError: its data cannot be had here, or its own code fails; the text says why.
        RuntimeError: its own code fails in one of several processes.
    """
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import get_task_dict

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            kind = "simple" if lm.is_simple else "chat"
            objects = team().together(lambda: get_task_dict([task], manager, kind))
    except Exception as cause:
        raise UnreachedError(f"its data or settings cannot be loaded ({_reason(cause)})") from cause
    loaded = list(_flat(objects))
    for one in filter(by_likelihood, loaded):
        count_impossible(one)
    try:
        with contextlib.redirect_stdout(said):
            found = simple_evaluate(
                model=lm,
                tasks=loaded,
                task_manager=manager,
                limit=limit,
                bootstrap_iters=0,
                distributed_executor_backend="torchrun",
                # Only where it is told a folder does it not write into the working directory.
                cli_args=Namespace(output_path=str(out), process_with_media=True, reasoning_tags=None),
                # MMMU draws a letter where it reads none: in threads that draw would not be the same twice.
                process_docs_parallel=1,
            )
            return [_read(one, found, limit, pictures) for one in loaded] if found is not None else []
    except Exception as cause:
        if world_size() > 1:  # the others wait in this task for what this process will not send
            raise RuntimeError(
                f"{task} stopped in process {rank()} of {world_size()} ({_reason(cause)}). Answers so far are kept: "
                "start it again with --resume, or without this task in another folder."
            ) from cause
        raise UnreachedError(f"it stopped ({_reason(cause)})") from cause


def _read(task: Any, found: Mapping[str, Any], limit: int | None, pictures: Path | None) -> TaskResult:
    name = task.config.task
    known = benchmark(name)
    split = task.config.test_split or task.config.validation_split
    docs = task.dataset[split]
    aggregated = {
        metric.partition(",")[0]: float(value)
        for metric, value in reversed(found["results"][name].items())  # of several filters, the first
        if isinstance(value, (int, float)) and not metric.partition(",")[0].endswith(("_stderr", "_clt", "_clustered"))
    }
    metrics = [metric for metric in task.aggregation() if metric in aggregated]
    main = known.metric if known else metrics[0] if metrics else ""
    samples = {sample["doc_id"]: sample for sample in reversed(found["samples"][name])}
    aggregate = task.aggregation().get(main)
    copies = None if pictures is None else _Copies(pictures)
    answered = []
    for number, sample in sorted(samples.items()):
        value = sample.get(main, sample.get(metrics[0]) if metrics else None)
        pair = value.get("pair_index") if isinstance(value, Mapping) else None
        visuals = _visuals(task, docs[number])
        prediction = _texts(sample["filtered_resps"])[0] if sample["filtered_resps"] else ""
        target = _texts(sample["target"])
        if by_likelihood(task):
            prediction, target = said_and_right(task, docs[number], sample)
        answered.append(
            Answered(
                id=str(number),
                question=str((sample.get("arguments") or [""])[0]),
                target=target,
                prediction=prediction,
                score=_score(value, aggregate),
                kind=_kind(known.kind if known else "", value, sample),
                picture=_digest(visuals) if visuals else "",
                pair=None if pair is None else str(pair),
                pictures=[] if copies is None else copies.of(visuals),
            )
        )
    if any(one.score is not None and not 0 <= one.score <= 1 for one in answered):  # points, or a percentage
        answered = [replace(one, score=None) for one in answered]
    clusters: list[Hashable] = [one.picture if one.pair is None else one.pair for one in answered]
    scored = [record_of(one, "exact") for one in answered if one.score is not None]
    totals = [row for row in rows_of(scored)[0] if not row.target] if scored else []
    numbers = {}
    for metric in metrics:
        values = [sample[metric] for _, sample in sorted(samples.items()) if metric in sample]
        numbers[metric] = (
            aggregated[metric],
            *_interval(aggregated[metric], totals, metric, values, clusters, task.aggregation()[metric]),
        )
    notes = [known.note] if known and known.note else []
    if limit is not None:
        notes.append(f"{PART}{len(answered)} of {len(docs)} questions")
    recorded = (known.recorded_as if known else "") or name
    return TaskResult(recorded, name, answered, numbers, notes, str(found.get("lmms_eval_version", "")))


def _score(value: Any, aggregate: Callable[..., Any] | None) -> float | None:
    """A question's own score from what the task keeps of it: a number, or a mapping that holds or implies one."""
    if isinstance(value, (bool, int, float)):
        return float(value)
    if isinstance(value, Mapping):
        for name in ("score", "is_correct", "correct", "acc"):
            if isinstance(value.get(name), (bool, int, float)):
                return float(value[name])
        if aggregate is not None:  # MMMU keeps what was read, and judges when it adds up
            with contextlib.suppress(Exception):
                alone = aggregate([value])
                return float(alone) if isinstance(alone, (int, float)) else None
    return None


def _interval(
    value: float,
    totals: Sequence[Measurement],
    metric: str,
    values: Sequence[Any],
    clusters: Sequence[Hashable],
    aggregate: Callable[..., Any],
) -> tuple[float | None, float | None]:
    """That of our row of the same value, else a bootstrap of lmms-eval's own aggregation over pictures."""
    for row in totals:
        if row.value is not None and abs(row.value - value) < _SAME and ("pair" in metric) == ("pair" in row.metric):
            return row.low, row.high
    groups: dict[Hashable, list[Any]] = {}
    if len(values) != len(clusters) or "pair" in metric:
        return None, None
    for one, cluster in zip(values, clusters, strict=True):
        groups.setdefault(cluster, []).append(one)
    listed, generator = list(groups.values()), np.random.default_rng(0)
    try:
        if not all(abs(float(aggregate(list(values))) - value) < _SAME for _ in range(2)):  # it adds to what it was
            return None, None
        drawn = [
            float(aggregate([one for i in generator.integers(len(listed), size=len(listed)) for one in listed[i]]))
            for _ in range(_RESAMPLES)
        ]
    except Exception:  # an aggregation that wants more than values has no interval; its value stands
        return None, None
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _kind(name: str, value: Any, sample: Mapping[str, Any]) -> str:
    for source in (value, sample.get("doc")):
        if name and isinstance(source, Mapping) and source.get(name) is not None:
            return str(source[name])
    return ""


def _visuals(task: Any, doc: Any) -> list[Any]:
    return [] if task.config.doc_to_visual is None else list(task.doc_to_visual(doc) or [])


def _digest(visuals: Sequence[Any]) -> str:
    """A name for pictures, the same wherever they are the same: a digest of their pixels."""
    digest = hashlib.sha256()
    for visual in visuals:
        pixels = hasattr(visual, "tobytes") and hasattr(visual, "mode")
        digest.update(repr((visual.size, visual.mode)).encode() + visual.tobytes() if pixels else repr(visual).encode())
    return digest.hexdigest()[:16]


class _Copies:
    """Small copies of pictures in a folder, each once, and of a task no more than a run shows."""

    def __init__(self, folder: Path) -> None:
        self.folder = make_folder(folder)
        self.names: dict[str, str] = {}

    def of(self, visuals: Sequence[Any]) -> list[str]:
        """The files of a question's pictures. What is no picture, or cannot be read, has none."""
        return [name for visual in visuals if (name := self._name(visual))]

    def _name(self, visual: Any) -> str:
        digest = _digest([visual])
        if digest not in self.names and len(self.names) < MOST:
            try:
                kind, content = encode(shrink(open_image(visual, digest), LONGEST_SIDE))
            except ImageError:
                return ""
            self.names[digest] = f"{digest}.{kind}"
            write_file(self.folder / self.names[digest], content)
        return self.names.get(digest, "")


def _texts(value: Any) -> list[str]:
    found = value if isinstance(value, (list, tuple)) else [value]
    return [str(_texts(one)[0] if isinstance(one, (list, tuple)) and one else one) for one in found] or [""]


def _flat(objects: Mapping[Any, Any]) -> Any:
    for value in objects.values():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield value[1] if isinstance(value, tuple) else value


def _reason(cause: BaseException) -> str:
    """The last words of what went wrong: what a retry gave up on, rather than that it did."""
    attempt = getattr(cause, "last_attempt", None)
    inner = attempt.exception() if attempt is not None else None
    cause = inner or cause
    text = " ".join(str(cause).split())
    return f"{type(cause).__name__}: {text[:300]}" if text else type(cause).__name__
