"""What an evaluation leaves in a run beside its rows: every question with its answer, and small pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from PIL import Image

from keepsight.evaluation.questions import Question, identity
from keepsight.evaluation.run import Evaluation
from keepsight.images import open_image
from keepsight.results import AnswerRecord, RunDirectory


def keep(run: RunDirectory, tasks: Mapping[str, Sequence[Question]], found: Mapping[str, Evaluation]) -> None:
    """Write answers.jsonl and thumbnails.zip of the tasks.

    Raises:
        StorageError: a file cannot be written.
    """
    run.write_answers(record for task, questions in tasks.items() for record in _records(task, questions, found[task]))
    run.write_thumbnails(picture for task, questions in tasks.items() for picture in _pictures(task, questions))


def _records(task: str, questions: Sequence[Question], found: Evaluation) -> Iterator[AnswerRecord]:
    answered = iter(found.records)
    for position, (question, names) in enumerate(zip(questions, _names(questions), strict=True)):
        why = found.left_out.get(position, "")
        record = None if why else next(answered)
        yield AnswerRecord(
            task=task,
            id=identity(question, position),
            question=question.question,
            prediction=record.prediction if record else "",
            reference=question.answers,
            score=record.score if record else None,
            scored_by=question.scored_by,
            images=tuple(names),
            choices=tuple(question.choices),
            type=question.kind,
            picture=None if question.picture is None else str(question.picture),
            pair=None if question.pair is None else str(question.pair),
            cut=bool(record and record.cut),
            left_out=why,
        )


def _pictures(task: str, questions: Sequence[Question]) -> Iterator[tuple[str, str, Image.Image]]:
    """Every picture once. One that cannot be opened costs its questions, which say so themselves."""
    seen: set[str] = set()
    for question, names in zip(questions, _names(questions), strict=True):
        for name, source in zip(names, question.images, strict=True):
            if name not in seen:
                seen.add(name)
                try:
                    image = open_image(source() if callable(source) else source, name)
                except Exception:  # as wide as where it was asked
                    continue
                yield task, name, image


def _names(questions: Sequence[Question]) -> Iterator[list[str]]:
    """Names of each question's pictures: a path as it was given, else the question's `picture`, else its id.

    Several pictures without a path may share a `picture`, which is what they are clustered by: only the first has it.
    """
    owner: dict[str, int] = {}
    for position, question in enumerate(questions):
        names = []
        for source in question.images:
            name = str(source)
            if isinstance(source, (Image.Image, bytes)) or (
                callable(source) and type(source).__str__ is object.__str__
            ):
                own = identity(question, position)
                name = own if question.picture is None else str(question.picture)
                number = 1
                while owner.setdefault(name, id(source)) != id(source):  # another picture has it
                    name = own if number == 1 else f"{own} ({number})"
                    number += 1
            names.append(name)
        yield names
