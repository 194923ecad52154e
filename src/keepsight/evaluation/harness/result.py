"""What a task of lmms-eval gave: its questions as our records, its numbers as our rows, kept as a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from keepsight.evaluation.questions import PictureFile, Question
from keepsight.evaluation.run import Evaluation
from keepsight.evaluation.scoring import Record, rows_of
from keepsight.results import Measurement, PerImage, make_folder, write_file

HARNESS = "harness_score"  # a number as lmms-eval aggregates it; the variant names it


@dataclass(frozen=True)
class Answered:
    """One question as lmms-eval asked and scored it.

    score: from 0 to 1; None where the task's own number is none of one question, or is in another unit. picture: names
    all its pictures together, for clustering. pictures: the files of each, in the folder of `run_task`.
    """

    id: str
    question: str
    target: list[str]
    prediction: str
    score: float | None
    kind: str = ""
    picture: str = ""
    pair: str | None = None
    pictures: list[str] = field(default_factory=list)


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

    def evaluation(self, pictures: Path | None = None) -> Evaluation:
        """Records, and rows `answer_accuracy` (by kind too) and `pair_accuracy` where questions have a score, and
        `harness_score`, one a number of lmms-eval's.

        Args:
            pictures: the folder of `run_task`; without it the records have none.
        """
        records = [record_of(one, self._score_as, pictures) for one in self.answered if one.score is not None]
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


def save_results(results: Sequence[TaskResult], path: Path) -> None:
    """Write a task, or all parts of a group, as JSON, whole or not at all."""
    make_folder(path.parent)
    write_file(path, json.dumps([asdict(result) for result in results], ensure_ascii=False, indent=1) + "\n")


def load_results(path: Path) -> list[TaskResult]:
    """What `save_results` wrote."""
    found = json.loads(path.read_text(encoding="utf-8"))
    for told in found:
        told["answered"] = [Answered(**one) for one in told["answered"]]
        told["numbers"] = {name: tuple(values) for name, values in told["numbers"].items()}
    return [TaskResult(**told) for told in found]


def record_of(one: Answered, score_as: Any, pictures: Path | None = None) -> Record:
    """A question with a score as one of our records."""
    assert one.score is not None
    question = Question(
        one.question,
        one.target or [""],
        [PictureFile(name, pictures) for name in one.pictures] if pictures else None,
        kind=one.kind,
        picture=f"pair {one.pair}" if one.pair is not None else one.picture or None,
        score=score_as,
        id=one.id,
        pair=one.pair,
    )
    return Record(question, one.prediction, one.score)
