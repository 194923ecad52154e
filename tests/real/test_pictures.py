"""The picture set: answers follow from the scene, masks from the glyphs, everything from the seed."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tests.real import fetch, pictures
from tests.real.pictures import CATEGORIES, PLACES, Scene, Thing


def scene(*things: Thing) -> Scene:
    blank = np.zeros((pictures.SIDE, pictures.SIDE), np.uint8)
    return Scene("007", things, "moon", 2, np.stack([blank] * 3, axis=2), blank)


TWO = scene(Thing("clock", 0, 3), Thing("animal", 2, 0))


def test_caption_goes_in_reading_order():
    assert pictures.caption(TWO) == "The picture shows an animal at the top left and a clock at the bottom right."


def test_every_answer_follows_from_the_scene():
    place_of = {"clock": "bottom right", "animal": "top left"}
    seen = Counter()
    for seed in range(400):
        turns = pictures.questions(TWO, np.random.default_rng(seed))
        assert len({question for _, question, _ in turns}) == len(turns) >= 4
        for kind, question, answer in turns:
            seen[kind, answer] += 1
            subject = question.rstrip("?").split(" the ")[-1]
            if kind == "what":
                assert answer == {"bottom right": "clock", "top left": "animal"}.get(subject, "nothing")
            elif kind == "where":
                assert answer == place_of[subject]
            elif kind == "count":
                assert answer == "two"
            else:
                assert answer == ("yes" if question.split()[-1].rstrip("?") in place_of else "no")
    assert {answer for kind, answer in seen if kind == "what"} == {"clock", "animal", "nothing"}
    assert seen["presence", "yes"] == seen["presence", "no"] == 400  # the wording alone gives nothing away


def test_conversation_has_one_placeholder_and_the_path_in_its_class_folder():
    entry = pictures.conversation(TWO, [("Where is the clock?", "bottom right"), ("How many?", "two")])
    assert entry["image"] == "clock/007.png"
    assert [turn["value"] for turn in entry["conversations"]] == [
        "<image>\nWhere is the clock?",
        "bottom right",
        "How many?",
        "two",
    ]


@pytest.mark.real
def test_the_set_is_whole_exact_and_repeatable(tmp_path):
    parts = fetch.fetch()
    first = pictures.write(tmp_path / "a", parts, train=6, test=40, seed=3)
    again = pictures.write(tmp_path / "b", parts, train=6, test=40, seed=3)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in files)
    with pytest.raises(FileExistsError, match="give a new folder"):
        pictures.write(first, parts, train=1, test=1)

    test = first / "test"
    labels = json.loads((test / "labels.json").read_text())
    asked = json.loads((test / "questions.json").read_text())
    assert set(labels) == {*pictures.ASKED, *pictures.UNASKED}
    assert all(list(of) == [entry["image"] for entry in asked] for of in labels.values())
    assert {path.parent.name for path in (test / "images").rglob("*.png")} <= set(CATEGORIES)
    for name, category in labels["category"].items():
        assert name.startswith(f"{category}/")
        pixels, mask = Image.open(test / "images" / name), np.asarray(Image.open(test / "masks" / name))
        assert pixels.size == mask.shape[::-1] == (pictures.SIDE, pictures.SIDE)
        background = np.asarray(pixels)[mask == 0].mean(axis=0)
        assert pictures.TINTS[int(background.argmax())] == labels["tint"][name]
        sizes = [int((mask == value).sum()) for value in range(1, int(mask.max()) + 1)]
        assert min(sizes) > 200
    single = json.loads((test / "eval.json").read_text())
    assert len(single) == sum(len(entry["conversations"]) // 2 for entry in asked)


@pytest.mark.real
def test_a_mask_is_the_glyphs_opaque_pixels_in_its_quadrant():
    painter = pictures.Painter(fetch.fetch())
    for seed in range(30):
        drawn = painter.scene("x", np.random.default_rng(seed))
        for index, thing in enumerate(drawn.things):
            rows, columns = np.nonzero(drawn.mask == index + 1)
            half = pictures.SIDE // 2
            assert set(rows // half) == {thing.place // 2}, PLACES[thing.place]
            assert set(columns // half) == {thing.place % 2}, PLACES[thing.place]
    # The background is tinted grey: one ratio between channels. A glyph's pixels do not keep to it, so what is
    # outside the mask must (clipping and half-transparent rims apart).
    ratio = (drawn.pixels[..., 0] + 1.0) / (drawn.pixels[..., 2] + 1.0)
    outside, inside = ratio[drawn.mask == 0], ratio[drawn.mask > 0]
    assert np.abs(outside / np.median(outside) - 1).mean() < 0.1 < np.abs(inside / np.median(outside) - 1).mean()
