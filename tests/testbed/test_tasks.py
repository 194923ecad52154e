"""The testbed's question sets: held out, balanced, and POPE's three ways to choose what is not there."""

from collections import Counter

import pytest

from keepsight.testbed import tasks
from keepsight.testbed._evaluate import HELD_OUT
from keepsight.testbed._text import SEED
from keepsight.testbed.demo import _TEST_WORLD, _TRAIN_WORLD
from keepsight.testbed.scenes import draw_scenes

COUNT = 40


@pytest.fixture(scope="module")
def scenes():
    return draw_scenes(tasks.WORLD, COUNT)


@pytest.fixture(scope="module")
def asked(scenes):
    return tasks.presence_questions(scenes)


def held(scene):
    return {f"{o.color} {o.shape}" for o in scene.objects}


def thing(question):
    return question.question.removeprefix("is there a ").removesuffix(" ?")


def of(asked, scene, setting, answer):
    name = f"{scene.seed}-{scene.index:06d}"
    return [thing(q) for q in asked if (q.picture, q.kind, q.answer) == (name, setting, answer)]


def test_scenes_that_nothing_trains_on():
    assert tasks.WORLD not in {HELD_OUT, SEED, *range(_TRAIN_WORLD, _TEST_WORLD + 1000)}


def test_true_and_balanced(scenes, asked):
    assert len({question.id for question in asked}) == len(asked)
    for scene in scenes:
        present = min(3, len(held(scene)))
        yes = [of(asked, scene, setting, "yes") for setting in tasks.SETTINGS]
        assert yes[0] == yes[1] == yes[2]
        assert len(yes[0]) == present
        assert set(yes[0]) <= held(scene)
        for setting in tasks.SETTINGS:
            no = of(asked, scene, setting, "no")
            assert len(set(no)) == present
            assert not set(no) & held(scene)


def test_what_is_not_there_is_chosen_as_pope_defines(scenes, asked):
    """Counted here by going through all scenes for every candidate."""
    every = [f"{color} {shape}" for color, shape in tasks.THINGS]
    scenes_with = Counter({name: sum(name in held(scene) for scene in scenes) for name in every})
    random = Counter()
    for scene in scenes:
        absent = [name for name in every if name not in held(scene)]
        shared = {
            name: sum(name in held(s) and own in held(s) for s in scenes for own in held(scene)) for name in absent
        }
        for setting, rank in (("popular", scenes_with), ("adversarial", shared)):
            no = of(asked, scene, setting, "no")
            assert (
                sorted((rank[name] for name in no), reverse=True)
                == sorted((rank[name] for name in absent), reverse=True)[: len(no)]
            )
        random.update(of(asked, scene, "random", "no"))
    assert len(random) > 25  # of 36: drawn from all of them
    different = [of(asked, s, "popular", "no") != of(asked, s, "adversarial", "no") for s in scenes]
    assert sum(different) > COUNT / 2


def test_the_same_again_and_by_name(scenes, asked, monkeypatch):
    monkeypatch.setattr(tasks, "SCENES", COUNT)
    again = tasks.TASKS["testbed-pope"]()
    assert [(q.id, q.question, q.answer, q.kind) for q in again] == [
        (q.id, q.question, q.answer, q.kind) for q in asked
    ]
    assert again[0].image.tobytes() == asked[0].image.tobytes()
    testbed = tasks.TASKS["testbed"]()
    assert len(testbed) == 6 * COUNT
    assert {q.kind for q in testbed} >= {"color", "shape", "how many", "is there", "same or different"}
