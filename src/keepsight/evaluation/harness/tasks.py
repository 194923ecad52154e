"""One of lmms-eval's tasks, run: its questions as our records, its numbers as our rows."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from argparse import Namespace
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from keepsight.evaluation.harness.paper import PART, benchmark
from keepsight.evaluation.questions import Question
from keepsight.evaluation.run import Evaluation
from keepsight.evaluation.scoring import Record, rows_of
from keepsight.results import Measurement, PerImage, make_folder, write_file

HARNESS = "harness_score"  # a number as lmms-eval aggregates it; the variant names it
_RESAMPLES = 500
_SAME = 1e-5  # MMMU's accuracy is rounded to five decimals


class UnreachedError(ValueError):
    """A task that could not be run here; the text says why."""


@dataclass(frozen=True)
class Answered:
    """One question as lmms-eval asked and scored it. score: None where its own number is none of one question."""

    id: str
    question: str
    target: list[str]
    prediction: str
    score: float | None
    kind: str = ""
    picture: str = ""
    pair: str | None = None


@dataclass(frozen=True)
class TaskResult:
    """What a task gave.

    Attributes:
        name: the task as results name it: `mmvp_corrected` for MMVP, whose labels are not the original ones.
        answered: its questions in order.
        numbers: "metric" → (value, low, high), lmms-eval's own aggregates; the interval None where there is none.
        notes: what to know of them.
        version: of lmms-eval.
    """

    name: str
    task: str
    answered: list[Answered]
    numbers: dict[str, tuple[float, float | None, float | None]]
    notes: list[str] = field(default_factory=list)
    version: str = ""

    @property
    def evaluation(self) -> Evaluation:
        """Records, and rows `answer_accuracy` (by kind too) and `pair_accuracy` where questions have a score, and
        `harness_score`, one a number of lmms-eval's."""
        records = [_record(one, self._score_as) for one in self.answered if one.score is not None]
        rows, per_image = rows_of(records) if records else ([], PerImage((), (), np.empty((0, 0))))
        note = "; ".join(self.notes)
        rows = [replace(row, note="; ".join(filter(None, (row.note, note)))) for row in rows]
        for name, (value, low, high) in self.numbers.items():
            rows.append(
                Measurement(
                    HARNESS, value, low=low, high=high, n=len(self.answered), unit="questions", variant=name, note=note
                )
            )
        return Evaluation(records, rows, per_image)

    @property
    def _score_as(self) -> Any:
        yes_no = all(len(one.target) == 1 and one.target[0].lower() in ("yes", "no") for one in self.answered)
        return "yes_no" if yes_no else "exact"

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        make_folder(path.parent)
        write_file(path, json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> TaskResult:
        """What `save` wrote."""
        told = json.loads(path.read_text(encoding="utf-8"))
        told["answered"] = [Answered(**one) for one in told["answered"]]
        told["numbers"] = {name: tuple(values) for name, values in told["numbers"].items()}
        return cls(**told)


def _record(one: Answered, score_as: Any) -> Record:
    assert one.score is not None
    question = Question(
        one.question,
        one.target or [""],
        kind=one.kind,
        picture=f"pair {one.pair}" if one.pair is not None else one.picture or None,
        score=score_as,
        id=one.id,
        pair=one.pair,
    )
    return Record(question, one.prediction, one.score)


def known_tasks(include_path: str | None = None) -> Any:
    """lmms-eval's task manager."""
    from lmms_eval.tasks import TaskManager
    from loguru import logger

    logger.disable("lmms_eval")
    return TaskManager("ERROR", include_path=include_path, model_name="keepsight")


def run_task(lm: Any, task: str, manager: Any, out: Path, limit: int | None = None) -> list[TaskResult]:
    """Run a task (or a group of them) with one of lmms-eval's models, and read what it gave.

    Args:
        lm: `Chat` or any other model of lmms-eval.
        manager: from `known_tasks`.
        out: where lmms-eval writes its submission files.

    Returns:
        One a task; of several processes, in the first only.

    Raises:
        UnreachedError: its data cannot be had here, or its own code fails; the text says why.
    """
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import get_task_dict

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            objects = get_task_dict([task], manager, "simple" if lm.is_simple else "chat")
    except Exception as cause:
        raise UnreachedError(f"its data or settings cannot be loaded ({_reason(cause)})") from cause
    loaded = list(_flat(objects))
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
    except Exception as cause:
        raise UnreachedError(f"it stopped ({_reason(cause)})") from cause
    if found is None:
        return []
    with contextlib.redirect_stdout(said):
        return [_read(one, found, limit) for one in loaded]


def _read(task: Any, found: Mapping[str, Any], limit: int | None) -> TaskResult:
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
    answered = []
    for number, sample in sorted(samples.items()):
        value = sample.get(main, sample.get(metrics[0]) if metrics else None)
        pair = value.get("pair_index") if isinstance(value, Mapping) else None
        answered.append(
            Answered(
                id=str(number),
                question=str((sample.get("arguments") or [""])[0]),
                target=_texts(sample["target"]),
                prediction=_texts(sample["filtered_resps"])[0] if sample["filtered_resps"] else "",
                score=_score(value, aggregate),
                kind=_kind(known.kind if known else "", value, sample),
                picture=_picture(task, docs[number]),
                pair=None if pair is None else str(pair),
            )
        )
    clusters: list[Hashable] = [one.picture if one.pair is None else one.pair for one in answered]
    own = rows_of([_record(one, "exact") for one in answered if one.score is not None])[0] if answered else []
    totals = [row for row in own if not row.target]
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


def _picture(task: Any, doc: Any) -> str:
    """A name for a question's pictures, the same wherever they are the same: a digest of their pixels."""
    visuals = [] if task.config.doc_to_visual is None else task.doc_to_visual(doc) or []
    digest = hashlib.sha256()
    for visual in visuals:
        pixels = hasattr(visual, "tobytes") and hasattr(visual, "mode")
        digest.update(repr((visual.size, visual.mode)).encode() + visual.tobytes() if pixels else repr(visual).encode())
    return digest.hexdigest()[:16] if visuals else ""


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
