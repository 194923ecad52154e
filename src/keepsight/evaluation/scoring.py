"""Scores of answers, and rows over all questions and by type, with intervals whose clusters are pictures. Ours, except
where another source is named."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from keepsight.evaluation.questions import LETTERS, Question, yes_or_no
from keepsight.results import Measurement, PerImage, PerImageBuilder
from keepsight.results.answers import clusters as clusters_of
from keepsight.results.intervals import bootstrap_ratio, mean_interval, ratio_shares

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_ARTICLES = {"a", "an", "the"}


@dataclass(frozen=True)
class Record:
    """What was answered to one question. score: in [0, 1]; cut: it was still writing at the length limit."""

    question: Question
    prediction: str
    score: float
    cut: bool = False

    @property
    def correct(self) -> bool:
        """Whether the score is full."""
        return self.score == 1.0


def normalise(answer: str) -> str:
    """Lower case, no punctuation, no articles, number words as digits, single spaces; "1,000" is 1000 and "-5" minus 5.

    An answer that is nothing else ("A", "the", "+") keeps its article, or its sign: it is not the empty answer.
    """
    text = unicodedata.normalize("NFC", answer.strip().lower())
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", re.sub(r"(?<![\w.])[-\u2212](?=\d)", "minus ", text))
    # By category: accents and vowel signs that are characters of their own (Hindi, Thai) are part of a word.
    words = "".join(" " if unicodedata.category(sign)[0] in "PS" else sign for sign in plain).split()
    kept = [str(_NUMBERS.index(word)) if word in _NUMBERS else word for word in words if word not in _ARTICLES]
    return " ".join(kept or words) or text


def score(question: Question, prediction: str, tried: bool = False) -> float:
    """The score of an answer in [0, 1], as `Question.scored_by` says.

    exact: equal to a right answer after `normalise`. contains: a right answer occurs in it, letters and spaces as they
    are but for case (OCRBench's rule). yes_no: its first yes or no is right. vqa: mean over all leave-one-out sets of
    annotators of min(1, annotators who said it / 3), after `normalise` (Antol et al. 2015; one or two annotators: any
    match). choice: `chosen` names the right one; where the choices were `tried`, the prediction is the text of one.
    """
    kind = question.scored_by
    if kind == "choice" and tried:
        return float(prediction == question.choices[question.right_choice()])
    if kind == "choice":
        return float(chosen(prediction, question.choices) == question.right_choice())
    if kind == "yes_no":
        said = yes_or_no(prediction)
        return float(said is not None and said == yes_or_no(question.answers[0]))
    if kind == "contains":
        text = prediction.lower()
        return float(any(answer.strip().lower() in text for answer in question.answers if answer.strip()))
    matches = [normalise(answer) == normalise(prediction) for answer in question.answers]
    if kind == "vqa" and len(matches) > 2:
        total = sum(matches)
        return float(np.mean([min(1.0, (total - match) / 3) for match in matches]))
    return float(any(matches))


def chosen(prediction: str, choices: Sequence[str]) -> int | None:
    """Which choice an answer names: by its letter ("B", "(b).", "**B**", "B. a cat", "answer: B"), else by its text.

    A text counts where it is the whole answer or occurs in it as words, and holds every other choice that occurs; None
    where no choice does.
    """
    plainly = re.sub(r"[*`]", "", prediction).strip()  # without Markdown's emphasis
    last = chr(ord("A") + min(len(choices), LETTERS) - 1)
    # What follows tells a letter from an article: "A." or "A", not "A cat".
    letter = re.search(
        rf"(?:^|(?i:\b(?:answer|option|choice)(?: is)?)\s*:?\s*)\(?([A-{last}a-{last.lower()}])(?:[).:,]|\s*$|\s*\n)",
        plainly,
    )
    if letter:
        return ord(letter[1].upper()) - ord("A")
    same = [i for i, choice in enumerate(choices) if choice.strip().lower() == prediction.strip().lower()]
    if len(same) == 1:
        return same[0]
    plain = [normalise(choice) for choice in choices]
    said = normalise(prediction)
    if plain.count(said) == 1:
        return plain.index(said)
    there = [i for i, choice in enumerate(plain) if choice and f" {choice} " in f" {said} "]
    longest = max(there, key=lambda i: len(plain[i]), default=None)
    if longest is None or plain.count(plain[longest]) > 1:
        return None
    return longest if all(f" {plain[i]} " in f" {plain[longest]} " for i in there) else None


def interval(scores: Sequence[float], clusters: Sequence[Hashable], seed: int = 0) -> tuple[float, float]:
    """95 % interval of a mean score.

    Wilson's where every question is right or wrong and has its own picture; else a percentile bootstrap over pictures
    (2,000 resamples). Where every picture scores the same the bootstrap would claim certainty: then Wilson's with
    n = pictures.

    Raises:
        ValueError: no questions, or not one cluster a question.
    """
    if not len(scores) or len(scores) != len(clusters):
        raise ValueError(
            f"interval needs one cluster for each of at least one answer; got {len(scores)} answers "
            f"and {len(clusters)} clusters"
        )
    sums: dict[Hashable, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for value, cluster in zip(scores, clusters, strict=True):
        sums[cluster][0] += float(value)
        sums[cluster][1] += 1
    table = np.array(list(sums.values()))  # [pictures, (points, asked)]
    binary = bool(np.isin(np.asarray(scores, dtype=float), (0.0, 1.0)).all())
    if len(table) < len(scores) or not binary:
        drawn = bootstrap_ratio(table[:, 0], table[:, 1], seed)
        if drawn.low is not None and drawn.high is not None:
            return drawn.low, drawn.high
    share = float((table[:, 0] / table[:, 1]).mean())
    found = binomtest(round(share * len(table)), len(table)).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def rows_of(records: Sequence[Record], metric: str = "answer_accuracy") -> tuple[list[Measurement], PerImage]:
    """Rows over all questions and then by type in alphabetical order, and what each picture adds to them.

    The mean score is called `metric`. With yes/no questions: `answer_f1`, of "yes", and `answer_yes`, the share
    answered with yes. With pairs: `pair_accuracy`, the share of pairs whose questions are all right.
    """
    asked = [record.question for record in records]
    ids = [question.id or str(i) for i, question in enumerate(asked)]
    clusters = clusters_of([question.picture for question in asked], [question.pair for question in asked], ids)
    names = {key: str(key[1]) if key[0] == "picture" else f"{key[0]} {key[1]}" for key in clusters}
    collector = _Collector(
        {cluster: column for column, cluster in enumerate(names)}, PerImageBuilder([*names.values()])
    )
    kinds = sorted({record.question.kind for record in records if record.question.kind})
    for kind in ["", *kinds]:
        chosen_ones = [i for i, record in enumerate(records) if kind in ("", record.question.kind)]
        part, place = [records[i] for i in chosen_ones], [clusters[i] for i in chosen_ones]
        collector.mean(metric, [record.score for record in part], place, kind)
        if metric != "answer_prior":
            _yes_no(collector, part, place, kind)
            _pairs(collector, part, place, kind)
    return collector.rows, collector.per_image.finish()


class _Collector:
    """Rows as they are found. place: cluster → column of `per_image`."""

    def __init__(self, place: dict[tuple[str, Hashable], int], per_image: PerImageBuilder) -> None:
        self.rows: list[Measurement] = []
        self.place = place
        self.per_image = per_image

    def mean(
        self,
        metric: str,
        scores: Sequence[float],
        clusters: Sequence[tuple[str, Hashable]],
        target: str,
        unit: str = "questions",
    ) -> None:
        low, high = interval(scores, clusters)
        row = Measurement(metric, float(np.mean(scores)), low=low, high=high, n=len(scores), unit=unit, target=target)
        ones = np.ones(len(scores))
        self._add(row, np.asarray(scores, dtype=np.float64), ones, clusters)

    def ratio(
        self, metric: str, above: np.ndarray, below: np.ndarray, clusters: Sequence[tuple[str, Hashable]], target: str
    ) -> None:
        """Σ above / Σ below, with the linearised interval over pictures."""
        sums = [self._sums(values, clusters)[1] for values in (above, below)]
        if not sums[1].sum():
            why = "neither the answers nor the truth has a yes"
            self.rows.append(Measurement(metric, None, n=len(above), unit="questions", target=target, note=why))
            return
        found = mean_interval(ratio_shares(*sums))
        low, high = (None if end is None else min(1.0, max(0.0, end)) for end in (found.low, found.high))
        value = float(sums[0].sum() / sums[1].sum())
        note = ""
        if low == high and low is not None:
            low, high, note = None, None, "no interval: all clusters agree"
        row = Measurement(metric, value, low=low, high=high, n=len(above), unit="questions", target=target, note=note)
        self._add(row, above, below, clusters)

    def _sums(self, values: np.ndarray, clusters: Sequence[tuple[str, Hashable]]) -> tuple[np.ndarray, np.ndarray]:
        columns, position = np.unique([self.place[cluster] for cluster in clusters], return_inverse=True)
        return columns, np.bincount(position, weights=values)

    def _add(
        self, row: Measurement, above: np.ndarray, below: np.ndarray, clusters: Sequence[tuple[str, Hashable]]
    ) -> None:
        columns, points = self._sums(above, clusters)
        _, asked = self._sums(below, clusters)
        self.rows.append(row)
        self.per_image.add(row.key, ratio_shares(points, asked), columns)


def _yes_no(
    collector: _Collector, records: Sequence[Record], clusters: Sequence[tuple[str, Hashable]], kind: str
) -> None:
    chosen_ones = [i for i, record in enumerate(records) if record.question.scored_by == "yes_no"]
    if not chosen_ones:
        return
    said = np.array([yes_or_no(records[i].prediction) is True for i in chosen_ones])
    truth = np.array([yes_or_no(records[i].question.answers[0]) is True for i in chosen_ones])
    place = [clusters[i] for i in chosen_ones]
    collector.ratio("answer_f1", 2.0 * (said & truth), said.astype(float) + truth, place, kind)
    collector.mean("answer_yes", said.astype(float).tolist(), place, kind)


def _pairs(
    collector: _Collector, records: Sequence[Record], clusters: Sequence[tuple[str, Hashable]], kind: str
) -> None:
    together: dict[Hashable, list[bool]] = defaultdict(list)
    where = {}
    for record, cluster in zip(records, clusters, strict=True):
        if record.question.pair is not None:
            together[record.question.pair].append(record.correct)
            where[record.question.pair] = cluster
    if together:
        right = [float(all(pair)) for pair in together.values()]
        collector.mean("pair_accuracy", right, [where[pair] for pair in together], kind, "pairs")
