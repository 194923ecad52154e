"""What is said about scenes: captions, described scenes as text, questions with their answers. Never the background.

Sentences are terse because sequence length is what a CPU pays for. Every question names its object without doubt:
by a shape or a colour that occurs once, or by its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from keepsight.testbed.scenes import COLORS, NUMBERS, PLACES, SHAPES, SIZES, Scene, SceneObject

CAPTION_REQUEST = "describe the picture ."
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}


@dataclass(frozen=True)
class Turn:
    """One question about a picture, and its answer. `kind` is one of `QUESTION_TYPES`."""

    question: str
    answer: str
    kind: str


def caption(scene: Scene) -> str:
    """The scene in words: the four places in reading order, each with its object or "nothing at all".

    Every caption has the same number of words, and a property always stands at the same distance from its place: a
    tiny language model then learns to look things up in minutes.
    """
    parts = []
    for place in PLACES:
        o = scene.at(place)
        parts.append(f"{o.size} {o.color} {o.shape} {place}" if o else f"nothing at all {place}")
    return " , ".join(parts) + " ."


def _unique(scene: Scene, field: str) -> list[SceneObject]:
    seen = Counter(getattr(o, field) for o in scene.objects)
    return [o for o in scene.objects if seen[getattr(o, field)] == 1]


def _choose(rng: np.random.Generator, items):
    return items[int(rng.integers(len(items)))]


def _color(scene: Scene, rng: np.random.Generator) -> Turn | None:
    named = _unique(scene, "shape")
    if not named or rng.random() < 0.25:
        o = _choose(rng, scene.objects)
        return Turn(f"what color is the {o.place} object ?", o.color, "color")
    o = _choose(rng, named)
    return Turn(f"what color is the {o.shape} ?", o.color, "color")


def _shape(scene: Scene, rng: np.random.Generator) -> Turn | None:
    named = _unique(scene, "color")
    if not named or rng.random() < 0.5:
        o = _choose(rng, scene.objects)
        return Turn(f"what is the {o.place} object ?", o.shape, "shape")
    o = _choose(rng, named)
    return Turn(f"what is the {o.color} object ?", o.shape, "shape")


def _where(scene: Scene, rng: np.random.Generator) -> Turn | None:
    by_color = rng.random() < 0.3
    named = _unique(scene, "color" if by_color else "shape")
    if not named:
        return None
    o = _choose(rng, named)
    if by_color:
        return Turn(f"where is the {o.color} object ?", o.place, "where")
    return Turn(f"where is the {o.shape} ?", o.place, "where")


def _size(scene: Scene, rng: np.random.Generator) -> Turn | None:
    named = _unique(scene, "shape")
    if not named:
        return None
    o = _choose(rng, named)
    return Turn(f"what size is the {o.shape} ?", o.size, "size")


def _count(scene: Scene, rng: np.random.Generator) -> Turn | None:
    if rng.random() < 0.3:
        return Turn("how many objects are there ?", NUMBERS[len(scene.objects)], "how many")
    # A property of a random object half the time: a random property alone would nearly always count zero.
    if rng.random() < 0.5:
        o = _choose(rng, scene.objects)
        color = o.color if rng.random() < 0.5 else _choose(rng, COLORS)
        found = sum(o.color == color for o in scene.objects)
        return Turn(f"how many {color} objects ?", NUMBERS[found], "how many")
    o = _choose(rng, scene.objects)
    shape = o.shape if rng.random() < 0.5 else _choose(rng, SHAPES)
    found = sum(o.shape == shape for o in scene.objects)
    return Turn(f"how many {PLURALS[shape]} ?", NUMBERS[found], "how many")


def exists(color: str, shape: str) -> str:
    """The question for an object."""
    return f"is there a {color} {shape} ?"


def _exists(scene: Scene, rng: np.random.Generator) -> Turn | None:
    present = {(o.color, o.shape) for o in scene.objects}
    color, shape = _choose(rng, sorted(present))
    if rng.random() < 0.5:  # near misses: one of the two properties is really there
        other = [(c, shape) for c in COLORS] + [(color, s) for s in SHAPES]
        color, shape = _choose(rng, [pair for pair in other if pair not in present])
    return Turn(exists(color, shape), "yes" if (color, shape) in present else "no", "is there")


def _left(scene: Scene, rng: np.random.Generator) -> Turn | None:
    named = _unique(scene, "shape")
    pairs = [(a, b) for a in named for b in named if a.column != b.column]
    if not pairs:
        return None
    a, b = _choose(rng, pairs)
    answer = "yes" if a.column < b.column else "no"
    return Turn(f"is the {a.shape} left of the {b.shape} ?", answer, "left of")


def _same(scene: Scene, rng: np.random.Generator) -> Turn | None:
    named = _unique(scene, "shape")
    pairs = [(a, b) for a in named for b in named if a is not b]
    wanted = rng.random() < 0.5
    pairs = [p for p in pairs if (p[0].color == p[1].color) == wanted] or pairs
    if not pairs:
        return None
    a, b = _choose(rng, pairs)
    answer = "same" if a.color == b.color else "different"
    return Turn(f"{a.shape} and {b.shape} : same or different color ?", answer, "same or different")


_ASKERS: dict[str, Callable[[Scene, np.random.Generator], Turn | None]] = {
    "color": _color,
    "shape": _shape,
    "where": _where,
    "size": _size,
    "how many": _count,
    "is there": _exists,
    "left of": _left,
    "same or different": _same,
}
QUESTION_TYPES = tuple(_ASKERS)
# Open questions are asked more often: guessing answers them seldom, so they say more about sight.
_WEIGHTS = {
    "color": 3,
    "shape": 3,
    "where": 3,
    "size": 2,
    "how many": 2,
    "is there": 2,
    "left of": 2,
    "same or different": 2,
}


def questions(scene: Scene, count: int = 6, *, salt: int = 0) -> list[Turn]:
    """`count` different questions about the scene, the same for the same (scene, salt).

    A scene offers at least 15 questions; fewer than `count` come back only for a larger `count` than that.
    """
    rng = np.random.default_rng([scene.seed, scene.index, 2, salt])
    kinds = [kind for kind, weight in _WEIGHTS.items() for _ in range(weight)]
    turns: dict[str, Turn] = {}
    for _ in range(40 * count):
        if len(turns) == count:
            break
        turn = _ASKERS[_choose(rng, kinds)](scene, rng)
        if turn is not None:
            turns.setdefault(turn.question, turn)
    return list(turns.values())


def words() -> list[str]:
    """Every word that captions, descriptions, questions and answers can hold, and a few that prompts use."""
    text = [CAPTION_REQUEST, *SHAPES, *PLURALS.values(), *COLORS, *SIZES, *PLACES, *NUMBERS]
    text += ["size there is a an and at the , . : ? ! object objects are how many what color where or of yes no"]
    text += ["same different left right i you it this that image photo in detail answer question with one word to"]
    text += ["see show shows contains which on nothing all"]
    return sorted({word for line in text for word in line.split()})
