"""How far one gets without looking: the best that the questions' wording alone allows. Ours."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from keepsight.evaluation.questions import Question
from keepsight.evaluation.run import Evaluation
from keepsight.evaluation.scoring import Record, rows_of, score


def text_only_prior(train: Sequence[Question], test: Sequence[Question]) -> Evaluation:
    """The best that can be had without the picture, as rows `answer_prior`.

    Each test question gets the answer most frequent in training for exactly this question; for a question never
    seen, the one most frequent for its type; for a type never seen, the one most frequent of all. Ties go to the
    first in the alphabet.

    Raises:
        ValueError: no training or no test questions.
    """
    if not train or not test:
        raise ValueError(f"the prior needs training and test questions; got {len(train)} and {len(test)}")
    counts: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for question in train:
        for key in _backing_off(question):
            counts[key][question.answers[0]] += 1
    records = []
    for question in test:
        seen = next(counts[key] for key in _backing_off(question) if key in counts)
        said = min(seen, key=lambda answer: (-seen[answer], answer))
        records.append(Record(question, said, score(question, said)))
    rows, per_image = rows_of(records, "answer_prior")
    return Evaluation(records, rows, per_image)


def _backing_off(question: Question) -> tuple[tuple[str, ...], ...]:
    return ("question", " ".join(question.question.lower().split())), ("kind", question.kind), ()
