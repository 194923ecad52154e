"""Questions about pictures: one as it is asked, and files and data sets of them."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from keepsight.images import resolve_image

Score = Literal["exact", "contains", "yes_no", "vqa", "choice"]
PLACEHOLDER = "<image>"
LETTERS = 26  # choices that can be listed with letters
_NAMES = {"answer": ("answer", "answers"), "image": ("image", "images"), "kind": ("type", "kind")}
_KNOWN = {"id", "question", "choices", "score", "picture", "pair", *(n for names in _NAMES.values() for n in names)}


class QuestionError(ValueError):
    """A question that cannot be asked or scored; the text names it and says why."""


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        question: its text; `<image>` marks where pictures stand, otherwise they come first.
        answer: the right answer, or those of several annotators.
        image: a picture (PIL, path, bytes, or a function that returns one), several, or None.
        kind: its type; accuracies are also told by type.
        picture: names the picture for clustering; without it each question is its own cluster.
        choices: the options of a multiple-choice question; the answer is one of them, its letter or its position.
        score: how an answer is scored; None decides by what is there, see `scored_by`.
        id: unique among the questions; empty = its number.
        pair: questions of one pair are also counted together: right only where all of them are (MMVP).
        turns: a whole conversation as chat messages (`role`, `content`), asked in place of `question`.
    """

    question: str
    answer: str | Sequence[str]
    image: Any = None
    kind: str = ""
    picture: Hashable = None
    choices: Sequence[str] = ()
    score: Score | None = None
    id: str = ""
    pair: Hashable = None
    turns: Sequence[Mapping[str, Any]] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        """All right answers."""
        return (self.answer,) if isinstance(self.answer, str) else tuple(self.answer)

    @property
    def images(self) -> tuple[Any, ...]:
        """All pictures."""
        if self.image is None:
            return ()
        return tuple(self.image) if isinstance(self.image, (list, tuple)) else (self.image,)

    @property
    def scored_by(self) -> Score:
        """`score`, or "choice" with choices, "yes_no" where the answer is yes or no, "vqa" with several answers, or
        "exact"."""
        if self.score is not None:
            return self.score
        if self.choices:
            return "choice"
        if len(self.answers) > 1:
            return "vqa"
        return "yes_no" if self.answers and self.answers[0].strip().lower().rstrip(".") in ("yes", "no") else "exact"

    def check(self) -> None:
        """Raise a QuestionError if it cannot be asked or scored."""
        if not self.question.strip():
            raise QuestionError("the question is empty")
        if not any(answer.strip() for answer in self.answers):
            raise QuestionError("the right answer is empty")
        if len(self.choices) == 1:
            raise QuestionError(f"there is one choice ({self.choices[0]!r}); give two or more, or none")
        if empty := [number for number, choice in enumerate(self.choices, start=1) if not choice.strip()]:
            raise QuestionError(f"choice {empty[0]} is empty")
        if self.choices:
            self.right_choice()
        elif self.score == "choice":
            raise QuestionError("it is scored by choice and has no choices")
        if self.score == "yes_no" and yes_or_no(self.answers[0]) is None:
            raise QuestionError(f"it is scored by yes or no, and its answer is {self.answers[0]!r}")
        marks = sum(text.count(PLACEHOLDER) for text in (self.question, *self.choices))
        if marks and marks != len(self.images):
            raise QuestionError(f"it has {marks} {PLACEHOLDER} and {len(self.images)} pictures; as many are needed")

    def right_choice(self) -> int:
        """Which of the choices is right.

        Raises:
            QuestionError: if the answer is none of them.
        """
        said = self.answers[0].strip()
        exact = [i for i, choice in enumerate(self.choices) if choice.strip().lower() == said.lower()]
        if len(exact) == 1:
            return exact[0]
        letter = said.strip("().").upper()
        if len(letter) == 1 and 0 <= (place := ord(letter) - ord("A")) < len(self.choices):
            return place
        raise QuestionError(f"the answer {said!r} is none of the choices {list(self.choices)}, nor the letter of one")


def yes_or_no(text: str) -> bool | None:
    """The first of the words yes and no; None where neither is there."""
    word = re.search(r"\b(yes|no)\b", text.lower())
    return None if word is None else word[1] == "yes"


def load_questions(source: Any, image_folder: str | Path | None = None) -> list[Question]:
    """Questions from a JSON-lines file, or from a HuggingFace data set or any other sequence of mappings.

    Fields: `question` and `answer` (a text or a list of texts), and as needed `image` (path or picture, or a list),
    `choices`, `type`, `id`, `picture`, `pair`, `score` ("exact", "contains", "yes_no", "vqa", "choice"). A position
    (an integer) as `answer` counts the choices from 0.

    Args:
        image_folder: where paths start; the file's own folder unless given. Nothing outside it is read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line is no JSON object, lacks a field or has a wrong one, or the file holds none.
    """
    folder = None if image_folder is None else Path(image_folder)
    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.is_file():
            kind = "is a folder, but no saved data set" if path.is_dir() else "does not exist"
            raise FileNotFoundError(f"the question file '{path}' {kind}.")
        folder = folder or path.parent
        with path.open(encoding="utf-8-sig") as file:
            entries: Iterable[tuple[str, Any]] = [
                (f"{path}:{number}", _json(line, f"{path}:{number}"))
                for number, line in enumerate(file, start=1)
                if line.strip()
            ]
    else:
        entries = ((f"question {number}", entry) for number, entry in enumerate(source))
    found = [_question(entry, where, folder, number) for number, (where, entry) in enumerate(entries)]
    if not found:
        raise ValueError(f"'{source}' holds no questions; write one JSON object a line")
    return found


def _json(line: str, where: str) -> Any:
    try:
        found = json.loads(line)
        if "\\u" in line:  # it may hold half a character ("\\ud800"), which neither a tokenizer nor a file takes
            whole = json.dumps(found, ensure_ascii=False).encode("utf-16", "surrogatepass")
            found = json.loads(whole.decode("utf-16", "replace"))
        return found
    except json.JSONDecodeError as cause:
        raise ValueError(f"{where}: this line is not JSON ({cause.msg}); write one object a line") from cause


def _question(entry: Any, where: str, folder: Path | None, number: int) -> Question:
    if not isinstance(entry, Mapping):
        raise ValueError(f'{where}: expected an object such as {{"question": …, "answer": …}}, got {str(entry)[:60]!r}')
    given = {name: entry[name] for name in _KNOWN if entry.get(name) is not None}
    for name, aliases in _NAMES.items():
        there = [alias for alias in aliases if alias in given]
        if len(there) > 1:
            raise ValueError(f"{where}: it has both {there[0]!r} and {there[1]!r}; give one of them")
        if there:
            given[name] = given.pop(there[0])
    for name in ("question", "answer"):
        if name not in given:
            raise ValueError(f"{where}: {name!r} is missing; it has the fields {sorted(map(str, entry))}")
    choices = given.get("choices") or ()
    if not isinstance(choices, (list, tuple)):
        raise ValueError(f"{where}: choices are a list of texts; got {str(choices)[:60]!r}")
    for name in ("picture", "pair"):
        if not isinstance(given.get(name), str | int | float | None):
            raise ValueError(f"{where}: {name} is a name, a text or a number; got {str(given[name])[:60]!r}")
    answer = given["answer"]
    if isinstance(answer, int) and not isinstance(answer, bool) and choices:
        if not 0 <= answer < len(choices):
            raise ValueError(f"{where}: the answer is position {answer}; there are {len(choices)} choices, from 0")
        answer = choices[answer]
    texts = [given["question"], *(answer if isinstance(answer, (list, tuple)) else [answer]), *choices]
    if wrong := [text for text in texts if not isinstance(text, (str, int, float)) or isinstance(text, bool)]:
        raise ValueError(f"{where}: question, answer and choices are texts; got {wrong[0]!r}")
    score = given.get("score")
    if score is not None and score not in get_args(Score):
        raise ValueError(f"{where}: score is {score!r}; allowed: {', '.join(get_args(Score))}")
    images = given.get("image")
    listed = list(images) if isinstance(images, (list, tuple)) else [] if images is None else [images]
    path = next((image for image in listed if isinstance(image, str)), None)
    return Question(
        question=str(given["question"]),
        answer=[str(one) for one in answer] if isinstance(answer, (list, tuple)) else str(answer),
        image=[PictureFile(image, folder) if isinstance(image, str) else image for image in listed] or None,
        kind=str(given.get("kind", "")),
        picture=given.get("picture", path),
        choices=tuple(map(str, choices)),
        score=score,
        id=str(given.get("id", number)),
        pair=given.get("pair"),
    )


class PictureFile:
    """A picture's path in a folder, resolved when it is opened, so that a missing picture costs one question."""

    def __init__(self, reference: str, folder: Path | None) -> None:
        self.reference, self.folder = reference, folder

    def __call__(self) -> Path:
        return resolve_image(self.reference, self.folder)

    def __str__(self) -> str:
        return self.reference


def askable(questions: Sequence[Question]) -> tuple[list[int], dict[int, str]]:
    """Positions of the questions that can be asked, and why the others cannot."""
    seen: dict[str, int] = {}
    refused: dict[int, str] = {}
    for position, question in enumerate(questions):
        name = identity(question, position)
        if name in seen:
            refused[position] = f"its id is that of question {seen[name] + 1}"
            continue
        seen[name] = position
        try:
            question.check()
        except QuestionError as error:
            refused[position] = str(error)
    return [position for position in range(len(questions)) if position not in refused], refused


def identity(question: Question, position: int) -> str:
    """A question's id, or its number."""
    return question.id or str(position)
