"""The testbed's question sets by name, for `keepsight evaluate --tasks testbed testbed-pope`: scenes that nothing
trains on, the same on every machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import permutations

import numpy as np
from PIL import Image

from keepsight.evaluation import Question
from keepsight.testbed.drawing import render
from keepsight.testbed.folders import name_of, vqa_items
from keepsight.testbed.language import exists
from keepsight.testbed.scenes import COLORS, SHAPES, Scene, draw_scenes

WORLD, SCENES = 90_000, 200  # a seed that neither pretraining nor the demo draws scenes from
TURNS = 6
MOST = 3  # objects of a scene that are asked for, and as many that are not there (POPE's l = 6)
SETTINGS = ("random", "popular", "adversarial")
Thing = tuple[str, str]  # colour and shape
THINGS: tuple[Thing, ...] = tuple((color, shape) for color in COLORS for shape in SHAPES)


def presence_questions(scenes: Sequence[Scene]) -> list[Question]:
    """POPE (Li et al. 2023, arXiv 2305.10355) on these scenes: "is there a red circle ?", as many yes as no.

    Each scene is asked for up to three of its objects, and for as many that it does not hold, chosen in three ways, the
    questions' types: "random", at random; "popular", those in most scenes; "adversarial", those that most often share
    a scene with the objects of this one. Frequencies are those of `scenes`; ties go in alphabetical order. The yes
    questions are the same in all three.
    """
    held = [sorted({(o.color, o.shape) for o in scene.objects}) for scene in scenes]
    frequent = Counter(thing for things in held for thing in things)
    together = Counter(pair for things in held for pair in permutations(things, 2))
    items = []
    for scene, things, pixels in zip(scenes, held, render(scenes)[0], strict=True):
        rng = np.random.default_rng([scene.seed, scene.index, 3])
        asked = [things[i] for i in sorted(rng.permutation(len(things))[:MOST])]
        absent = sorted(set(THINGS) - set(things))
        drawn = [absent[i] for i in rng.permutation(len(absent))]
        shared = {thing: sum(together[thing, own] for own in things) for thing in absent}
        absent_by = {
            "random": drawn,
            "popular": sorted(absent, key=lambda thing: -frequent[thing]),
            "adversarial": sorted(absent, key=shared.__getitem__, reverse=True),
        }
        image, name = Image.fromarray(pixels), name_of(scene)
        for setting in SETTINGS:
            for thing, answer in [
                *((thing, "yes") for thing in asked),
                *((thing, "no") for thing in absent_by[setting][: len(asked)]),
            ]:
                identity = f"{name} {setting} {' '.join(thing)}"
                items.append(Question(exists(*thing), answer, image, setting, picture=name, id=identity))
    return items


TASKS: Mapping[str, Callable[[], list[Question]]] = {
    "testbed": lambda: vqa_items(draw_scenes(WORLD, SCENES), TURNS),
    "testbed-pope": lambda: presence_questions(draw_scenes(WORLD, SCENES)),
}
