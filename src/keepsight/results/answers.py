"""What a model answered, question by question: answers.jsonl of a run, for looking at answers and comparing runs."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from scipy.cluster.hierarchy import DisjointSet

from keepsight.results.storage import write_file

ANSWERS = "answers.jsonl"
Cluster = tuple[str, Hashable]


@dataclass(frozen=True)
class AnswerRecord:
    """One question of a task, and what became of it.

    Attributes:
        task: name of the question file, data set or benchmark.
        id: unique within the task.
        prediction: what the model said; reference: the right answer, or those of several annotators.
        score: in [0, 1]; None where the question was left out.
        scored_by: "exact", "choice", …, as in docs/evaluation.md.
        images: names of its pictures, paths relative to the image folder where they have one.
        type: of question. picture, pair: what it is clustered by.
        cut: it was still being written at the length limit.
        left_out: why the question was not asked, or "".
    """

    task: str
    id: str
    question: str
    prediction: str = ""
    reference: tuple[str, ...] = ()
    score: float | None = None
    scored_by: str = ""
    images: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    type: str = ""
    picture: str | None = None
    pair: str | None = None
    cut: bool = False
    left_out: str = ""

    @property
    def correct(self) -> bool:
        """Whether the score is full."""
        return self.score == 1.0


def clusters(pictures: Sequence[Hashable], pairs: Sequence[Hashable], names: Sequence[str]) -> list[Cluster]:
    """What each question is resampled with: questions that share a picture or a pair are one cluster.

    Args:
        pictures, pairs: one a question; None where it has none.
        names: of the questions; one without picture and pair is its own cluster.

    Returns:
        ("picture", …), ("pair", …) or ("question", …) of each: the first in their order that the cluster holds.
    """
    keys: list[list[Cluster]] = []
    for picture, pair, name in zip(pictures, pairs, names, strict=True):
        both: list[Cluster] = [] if picture is None else [("picture", picture)]
        keys.append([*both, *([] if pair is None else [("pair", pair)])] or [("question", name)])
    sets: DisjointSet = DisjointSet()
    for own in keys:
        for key in own:
            sets.add(key)
            sets.merge(own[0], key)
    first: dict[Cluster, Cluster] = {}
    return [first.setdefault(sets[own[0]], own[0]) for own in keys]


def target_of(task: str, kind: str, tasks: int) -> str:
    """The rows' target for a type of question (or "" for all): with several tasks it begins with the task."""
    return kind if tasks == 1 else f"{task}, {kind}" if kind else task


def write_answers(folder: Path, answers: Iterable[AnswerRecord]) -> Path:
    """Write answers.jsonl, one JSON object a line, in one step.

    Raises:
        StorageError: if the disk is full or the folder may not be written to.
    """
    return write_file(folder / ANSWERS, "".join(json.dumps(asdict(a), ensure_ascii=False) + "\n" for a in answers))


def read_answers(folder: Path) -> list[AnswerRecord]:
    """What `write_answers` wrote; an empty list where a run has none.

    Raises:
        ValueError: if a line is cut off, or is no such record; the text names file and line.
    """
    path = folder / ANSWERS
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [_read(line, f"{path}:{number}") for number, line in enumerate(file, start=1) if line.strip()]


_TEXTS = ("task", "id", "question", "prediction", "scored_by", "type", "left_out")
_LISTS = ("reference", "images", "choices")


def _read(line: str, place: str) -> AnswerRecord:
    try:
        entry = json.loads(line)
        fit: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()
        }
        record = AnswerRecord(**fit)
    except (json.JSONDecodeError, TypeError, AttributeError) as cause:
        known = ", ".join(f.name for f in fields(AnswerRecord))
        raise ValueError(
            f"{place}: this line is no answer ({cause}); its fields are {known}. The file was cut off or edited: "
            "remove it, and the run is compared without its questions, or evaluate again"
        ) from cause
    wrong = [name for name in _TEXTS if not isinstance(getattr(record, name), str)]
    wrong += [name for name in ("picture", "pair") if not isinstance(getattr(record, name), str | None)]
    for name in _LISTS:
        value = getattr(record, name)
        wrong += [] if isinstance(value, tuple) and all(isinstance(item, str) for item in value) else [name]
    if not (record.score is None or (isinstance(record.score, (int, float)) and 0 <= record.score <= 1)):
        wrong.append("score")
    if wrong:
        raise ValueError(
            f"{place}: {wrong[0]} is {getattr(record, wrong[0])!r}; texts are strings, score is from 0 to 1. The file "
            "was edited: remove it, and the run is compared without its questions, or evaluate again"
        )
    return record
