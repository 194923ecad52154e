"""What changed from one run to another: questions that only one of them gets right, with pictures and both answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from rich.table import Table
from rich.text import Text

from keepsight.report.curves import Run
from keepsight.report.metrics import difference_parts, write_number
from keepsight.report.pictures import Picture, show
from keepsight.results import AnswerRecord, Example
from keepsight.results.changes import Change, Pair, changes

CARDS, OF_A_TYPE = 48, 6  # shown of a comparison, and of one direction and type: the page stays small
QUESTION, ANSWER = 400, 200  # characters shown
PICTURES = 4  # of one question


@dataclass(frozen=True)
class Line:
    """A type of question in the table. right, wrong: questions that only the first, or only the second, gets right."""

    title: str
    whole: bool  # of a task, not of one of its types
    questions: int
    before: str
    after: str
    difference: str
    interval: str
    told: bool
    only_before: int
    only_after: int
    bars: tuple[float, float]  # their lengths in percent of the longest in a line of this sort


@dataclass(frozen=True)
class Card:
    """One question with its pictures and both answers. missing: pictures that were not kept."""

    pictures: list[Picture]
    missing: int
    question: str
    choices: list[str]
    reference: str
    before: str
    after: str


@dataclass(frozen=True)
class Kind:
    """Of one direction and type: how many changed, and some of them."""

    title: str
    count: int
    cards: list[Card]


@dataclass(frozen=True)
class Direction:
    """What only one of the two runs gets right."""

    run: int  # which
    count: int
    kinds: list[Kind]

    @property
    def shown(self) -> int:
        return sum(len(kind.cards) for kind in self.kinds)


@dataclass(frozen=True)
class Changed:
    """One run against the first. elsewhere: questions that only one of them answered."""

    run: int
    lines: list[Line]
    directions: list[Direction]
    elsewhere: int


def changed(runs: Sequence[Run]) -> list[Changed]:
    """Every later run against the first, where both kept their answers to the same questions.

    Raises:
        ValueError: if a run's file of pictures is damaged.
    """
    found = []
    for number, run in enumerate(runs[1:], start=1):
        lines = changes(runs[0].loaded.answers, run.loaded.answers)
        if lines:
            gains = _direction(number, 0, number, lines, runs)
            losses = _direction(0, 0, number, lines, runs)
            elsewhere = sum(line.elsewhere for line in lines if not line.type)
            found.append(Changed(number, [_line(line, lines) for line in lines], [gains, losses], elsewhere))
    return found


def changed_table(runs: Sequence[Run]) -> Table | None:
    """For the terminal: how many questions only one of two runs gets right, by type; None where nothing is shared."""
    grid = Table(title="Questions that only one of two runs gets right", title_justify="left", header_style="bold")
    grid.pad_edge = False
    several = len(runs) > 2
    for name in (
        "questions",
        "both",
        f"only {runs[0].label}",
        "only the other" if several else f"only {runs[-1].label}",
    ):
        grid.add_column(Text(name), justify="left" if name == "questions" else "right")
    grid.add_column("difference", justify="right")
    for run in runs[1:]:
        lines = changes(runs[0].loaded.answers, run.loaded.answers)
        for line in (_line(item, lines) for item in lines):
            difference = Text(line.difference, style="bold" if line.told else "dim").append(f" {line.interval}")
            counts = (line.questions, line.only_before, line.only_after)
            title = f"{run.label}: {line.title}" if several else line.title
            grid.add_row(Text(title), *(f"{count:,}" for count in counts), difference)
    return grid if grid.rows else None


def _line(change: Change, every: Sequence[Change]) -> Line:
    metric, found = "answer_accuracy", change.difference
    several = len({line.task for line in every}) > 1
    whole = change.task if several else "all questions"
    peers = [line for line in every if bool(line.type) == bool(change.type)]
    number, interval = difference_parts(metric, found.value or 0.0, found.low, found.high)
    longest = max(1, *(len(pairs) for line in peers for pairs in (line.only_before, line.only_after)))
    return Line(
        title=change.type or whole,
        whole=not change.type,
        questions=change.questions,
        before=write_number(metric, change.before),
        after=write_number(metric, change.after),
        difference=number,
        interval=interval,
        told=found.told,
        only_before=len(change.only_before),
        only_after=len(change.only_after),
        bars=(round(100 * len(change.only_before) / longest, 1), round(100 * len(change.only_after) / longest, 1)),
    )


def _direction(right: int, first: int, second: int, lines: Sequence[Change], runs: Sequence[Run]) -> Direction:
    """What only run `right` of `first` and `second` gets right, in the order of the types."""
    groups: dict[tuple[str, str], list[Pair]] = {}
    for line in lines:
        if not line.type:
            for pair in line.only_before if right == first else line.only_after:
                groups.setdefault((line.task, pair[0].type), []).append(pair)
    several = len({line.task for line in lines}) > 1
    tasks = [line.task for line in lines]
    ordered = sorted(groups.items(), key=lambda item: (tasks.index(item[0][0]), item[0][1]))
    shares = _shares([len(pairs) for _, pairs in ordered], CARDS // 2)
    kinds = [
        Kind(
            ", ".join(filter(None, [task if several else "", kind])),
            len(pairs),
            [_card(pair, (runs[first], runs[second])) for pair in pairs[:share]],
        )
        for ((task, kind), pairs), share in zip(ordered, shares, strict=True)
    ]
    return Direction(right, sum(kind.count for kind in kinds), kinds)


def _shares(counts: Sequence[int], room: int) -> list[int]:
    """How many of each are shown: one of each in turn, until the room is used up."""
    rounds = zip_longest(*(range(min(count, OF_A_TYPE)) for count in counts))
    turns = [group for turn in rounds for group, number in enumerate(turn) if number is not None][:room]
    return [turns.count(group) for group in range(len(counts))]


def _card(pair: Pair, runs: tuple[Run, Run]) -> Card:
    one, other = pair
    names = one.images[:PICTURES]
    found = [picture for name in names if (picture := _picture(name, pair, runs)) is not None]
    return Card(
        pictures=found,
        missing=len(one.images) - len(found),
        question=_short(one.question, QUESTION),
        choices=[_short(choice, ANSWER) for choice in one.choices],
        reference=" / ".join(dict.fromkeys(_short(answer, ANSWER) for answer in one.reference)),
        before=_said(one),
        after=_said(other),
    )


def _picture(name: str, pair: Pair, runs: tuple[Run, Run]) -> Picture | None:
    for record, run in zip(pair, runs, strict=True):
        kept = run.loaded.thumbnails
        image = kept.get(record.task, name) if kept else None
        if image is not None:
            return replace(show(Example(image)), name=name)
    return None


def _said(record: AnswerRecord) -> str:
    return _short(record.prediction, ANSWER) + (" …" if record.cut and len(record.prediction) <= ANSWER else "")


def _short(text: str, most: int) -> str:
    text = text.strip()
    return text if len(text) <= most else f"{text[:most].rstrip()}… ({len(text):,} characters)"
