"""`evaluate`: all questions, in batches, with a journal that a stopped evaluation goes on from."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from keepsight.diagnosis.progress import tracked
from keepsight.evaluation.generate import Answer, Answerer, Choices
from keepsight.evaluation.questions import Question, askable, identity
from keepsight.evaluation.scoring import Record, rows_of, score
from keepsight.processes import barrier, rank, world_size
from keepsight.results import Measurement, PerImage, make_folder
from keepsight.results.storage import storage_error
from keepsight.vlm import Vlm
from keepsight.vlm.inference import inference
from keepsight.vlm.pruning import Pruning, pruned


class NothingAskedError(ValueError):
    """None of the questions can be asked; the text says why the first cannot."""


@dataclass(frozen=True)
class Evaluation:
    """Records in the order of the questions, rows (`scoring.rows_of`), and what each picture adds to them.

    left_out: position of a question that could not be asked → why; counts: what happened, for the report.
    """

    records: list[Record]
    rows: list[Measurement]
    per_image: PerImage
    left_out: dict[int, str] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Questions answered and left out, and answers that were empty or cut off."""
        found = Counter(
            {
                "questions": len(self.records),
                "questions left out": len(self.left_out),
                "empty answers": sum(not record.prediction for record in self.records),
                "answers cut off by max_new_tokens": sum(record.cut for record in self.records),
            }
        )
        return dict(+found)


def evaluate(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 32,
    choices: Choices = "generation",
    pruning: Pruning | None = None,
    journal: str | Path | None = None,
    progress: bool = False,
    done: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """Ask every question and score the answers, as rows `answer_accuracy` and its kin.

    Prompts come from the processor's chat template. Batches are padded on the left, so that an answer does not
    depend on what it shares a batch with; questions with different numbers of pictures go in batches apart. The model
    is left in the mode (train or eval) it was in. A question that cannot be asked costs itself only: it is left out
    and counted.

    Args:
        choices: how multiple choice is answered, see `Answerer`.
        pruning: drop visual tokens after a layer, see `keepsight.vlm.pruning`.
        journal: a folder of answers. Those that it holds are not asked for again, new ones are added as they come, so
            that a stopped evaluation goes on. Several processes need one: each asks its share, all return everything.
        done: called with the number of questions that a batch finished.

    Raises:
        ValueError: no questions, none that can be asked, or a batch size or answer length below one.
        StorageError: the journal cannot be written.
    """
    for name, value in (
        ("number of questions", len(questions)),
        ("batch_size", batch_size),
        ("max_new_tokens", max_new_tokens),
    ):
        if value < 1:
            raise ValueError(f"{name} is {value}; answering needs at least 1")
    asked, left_out = askable(questions)
    answers = Journal(None if journal is None else Path(journal), questions)
    waiting = [position for position in asked if position not in answers.known]
    if world_size() > 1 and journal is None:
        raise ValueError("several processes need a journal, a folder that all of them reach; journal is None")
    barrier()  # before the first answer is added, so that all processes share out the same questions
    batches = list(batches_of(questions, waiting[rank() :: world_size()], batch_size))
    with inference(model), nullcontext() if pruning is None else pruned(Vlm(model), pruning):
        answerer = Answerer(model, processor, max_new_tokens, choices)
        for batch in tracked(batches, "questions", progress, len(batches)):
            answers.add(batch, answerer.answer([questions[position] for position in batch]))
            done(len(batch))
    return assemble(questions, answers.gather(), left_out, tried=choices == "likelihood")


def assemble(
    questions: Sequence[Question], answers: dict[int, Answer], left_out: dict[int, str], tried: bool = False
) -> Evaluation:
    """Records and rows from answers by position; tried: of questions with choices, the likeliest was taken.

    Raises:
        NothingAskedError: if nothing was answered.
    """
    left_out = left_out | {position: answer.refused for position, answer in answers.items() if answer.refused}
    records = [
        Record(questions[position], answer.text, score(questions[position], answer.text, tried), answer.cut)
        for position, answer in sorted(answers.items())
        if position not in left_out
    ]
    if not records:
        first = min(left_out)
        raise NothingAskedError(f"none of the {len(questions)} questions can be asked; the first: {left_out[first]}")
    rows, per_image = rows_of(records)
    return Evaluation(records, rows, per_image, dict(sorted(left_out.items())))


def batches_of(questions: Sequence[Question], waiting: Sequence[int], size: int) -> Iterator[list[int]]:
    """Questions with as many pictures together, in their order."""
    for number in sorted({len(questions[position].images) for position in waiting}):
        group = [position for position in waiting if len(questions[position].images) == number]
        for start in range(0, len(group), size):
            yield group[start : start + size]


class Journal:
    """Answers by position, and the folder they are kept in: one file of lines for each process.

    shared: the folder may hold answers to other questions too, which are passed over.

    A last line that was cut off is not taken for an answer. Refusals count for the evaluation that wrote them; one that
    goes on asks again, when the picture may be there.
    """

    def __init__(self, folder: Path | None, questions: Sequence[Question], shared: bool = False) -> None:
        self.folder, self.shared = folder, shared
        self.names = [identity(question, position) for position, question in enumerate(questions)]
        self.texts = ["\n".join([question.question, *question.choices]) for question in questions]  # what was asked
        self.known: dict[int, Answer] = {}
        self._synced = 0.0  # when the disk last had everything
        if folder is not None:
            make_folder(folder)
            _cut_to_whole_lines(folder / f"answers-{rank()}.jsonl")
            self.known = self._read(refused=False)

    def add(self, positions: Sequence[int], answers: Sequence[Answer]) -> None:
        """Keep answers.

        Raises:
            StorageError: they cannot be written.
        """
        self.known.update(zip(positions, answers, strict=True))
        if self.folder is None:
            return
        lines = [
            {"id": self.names[position], "question": self.texts[position], **asdict(answer)}
            for position, answer in zip(positions, answers, strict=True)
        ]
        path = self.folder / f"answers-{rank()}.jsonl"
        try:
            with path.open("ab") as file:
                file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
                file.flush()  # a process that is killed now loses nothing; a machine, at most a second's answers
                if (now := time.monotonic()) - self._synced > 1:
                    os.fsync(file.fileno())
                    self._synced = now
        except OSError as cause:
            raise storage_error(path, cause) from cause

    def gather(self) -> dict[int, Answer]:
        """The answers of all processes, when all have finished."""
        barrier()
        return self.known if self.folder is None else self._read(refused=True) | self.known

    def _read(self, refused: bool) -> dict[int, Answer]:
        assert self.folder is not None
        place = {name: position for position, name in reversed(list(enumerate(self.names)))}
        found: dict[int, Answer] = {}
        for path in sorted(self.folder.glob("answers-*.jsonl")):
            content = path.read_bytes()
            for number, line in enumerate(content[: content.rfind(b"\n") + 1].decode().split("\n")[:-1], start=1):
                entry = json.loads(line)
                position = place.get(entry["id"])
                if position is None and self.shared:
                    continue
                if position is None or self.texts[position] != entry["question"]:
                    raise ValueError(
                        f"'{path}', line {number}: question {entry['id']!r} is not among the questions asked now, or "
                        "has another text or other choices. Go on with the questions it was started with, or choose "
                        "another folder"
                    )
                answer = Answer(entry["text"], entry["cut"], entry["refused"])
                if not answer.refused or (refused and position not in found):
                    found[position] = answer
        return found


def _cut_to_whole_lines(path: Path) -> None:
    if path.is_file():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)
