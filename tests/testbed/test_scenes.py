import hashlib
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from keepsight.testbed import scenes as world
from keepsight.testbed.drawing import PALETTE, inside, mask, picture, render
from keepsight.testbed.scenes import CELL, Scene, SceneObject, draw_scene, draw_scenes


def scene_of(*objects: SceneObject, **changes) -> Scene:
    plain = {
        "seed": 0,
        "index": 0,
        "objects": objects,
        "texture": "stripes",
        "orientation": "0 degrees",
        "lighting": "from 0 degrees",
        "tint": "hue 0",
        "period": 8.0,
        "phase": 0.0,
        "contrast": 0.0,
        "brightness": 120.0,
    }
    return Scene(**{**plain, **changes})


def test_masks_are_exactly_the_painted_pixels():
    scenes = draw_scenes(7, 60)
    pictures, masks = render(scenes)
    bare, _ = render([Scene(**{**s.__dict__, "objects": ()}) for s in scenes])
    differs = (pictures != bare).any(axis=-1)
    # Noise, light and background are the same with and without objects, so only painted pixels may differ, and
    # an object's colour is far from grey in at least one channel, so every painted pixel does.
    assert np.array_equal(differs, masks > 0)
    assert masks.dtype == np.uint8
    for scene, m in zip(scenes, masks, strict=True):
        assert set(np.unique(m)) == set(range(len(scene.objects) + 1))


def test_mask_numbers_follow_the_objects_and_stay_in_their_quadrant():
    for scene in draw_scenes(8, 40):
        m = mask(scene)
        for k, o in enumerate(scene.objects, start=1):
            rows, columns = np.nonzero(m == k)
            assert set(rows // CELL) == {o.row}
            assert set(columns // CELL) == {o.column}
            pixels = np.asarray(picture(scene), dtype=float)[m == k].mean(axis=0)
            nearest = min(PALETTE, key=lambda name: np.abs(np.array(PALETTE[name]) - pixels).sum())
            assert nearest == o.color


def test_shapes_cover_the_area_that_geometry_says():
    y, x = np.mgrid[-400:400, -400:400] / 20 + 0.025
    area = {shape: inside(shape, x, y, np.float64(10.0)).sum() / 400 for shape in world.SHAPES}
    arm = 0.34 * 20
    expected = {
        "circle": np.pi * 100,
        "ring": np.pi * (100 - 25),
        "square": 16.4**2,
        "diamond": 200.0,
        "cross": 2 * 20 * arm - arm**2,
        "triangle": 0.55 * 17.5**2,
    }
    for shape, value in expected.items():
        assert area[shape] == pytest.approx(value, rel=0.01), shape
    with pytest.raises(ValueError, match="unknown shape 'blob'; the world has circle, square"):
        inside("blob", x, y, np.float64(1.0))


def test_ring_has_a_hole_in_the_mask():
    ring = SceneObject("ring", "red", "large", "top left", 16.0, 16.0, 14.0)
    m = mask(scene_of(ring))
    assert m[15, 15] == 0
    assert m[15, 15 + 10] == 1


def test_light_comes_from_where_the_label_says():
    pixels = {}
    for angle in (0, 90, 180, 270):
        pixels[angle] = render([scene_of(lighting=f"from {angle} degrees")])[0][0].astype(float)
    assert pixels[0][:, 48:].mean() > pixels[0][:, :16].mean() + 5
    assert pixels[90][48:].mean() > pixels[90][:16].mean() + 5  # y points down
    assert pixels[180][:, :16].mean() > pixels[180][:, 48:].mean() + 5
    assert pixels[270][:16].mean() > pixels[270][48:].mean() + 5


def test_orientation_turns_the_texture():
    across = render([scene_of(contrast=18.0)])[0][0, ..., 0].astype(float)
    turned = render([scene_of(contrast=18.0, orientation="90 degrees")])[0][0, ..., 0].astype(float)
    # Steps from line to line, so that the slope of the light does not count.
    across_x, across_y = (np.diff(across.mean(axis=axis)).std() for axis in (0, 1))
    turned_x, turned_y = (np.diff(turned.mean(axis=axis)).std() for axis in (0, 1))
    assert across_x > 2 * across_y
    assert turned_y > 2 * turned_x


def test_one_scene_is_the_same_alone_in_a_batch_and_in_another_process():
    code = (
        "import hashlib\n"
        "from keepsight.testbed.drawing import render\n"
        "from keepsight.testbed.language import caption, questions\n"
        "from keepsight.testbed.scenes import draw_scenes\n"
        "s = draw_scenes(3, 5, start=10)\n"
        "p, m = render(s)\n"
        "said = repr([(x, caption(x), questions(x)) for x in s])\n"
        "print(hashlib.sha256(p.tobytes() + m.tobytes() + said.encode()).hexdigest())\n"
    )
    first, second = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        for _ in range(2)
    )
    assert first == second
    assert len(first) == len(hashlib.sha256().hexdigest())
    batch, masks = render(draw_scenes(3, 5, start=10))
    assert draw_scenes(3, 5, start=10)[2] == draw_scene(3, 12)
    assert np.array_equal(np.asarray(picture(draw_scene(3, 12))), batch[2])
    assert np.array_equal(mask(draw_scene(3, 12)), masks[2])
    assert not np.array_equal(batch[0], render([draw_scene(4, 10)])[0][0])


def test_labels_tell_the_truth_and_every_class_occurs():
    scenes = draw_scenes(9, 800)
    seen = {target: Counter(s.labels()[target] for s in scenes) for target in (*world.ASKED, *world.UNASKED)}
    assert set(scenes[0].labels()) == set(seen)
    assert set(seen["count"]) == {"two", "three", "four"}
    assert set(seen["top_left_color"]) == {*world.COLORS, world.NOTHING}
    for target, classes in (
        ("texture", world.TEXTURES),
        ("orientation", world.ORIENTATIONS),
        ("lighting", world.LIGHTINGS),
        ("tint", world.TINTS),
    ):
        assert set(seen[target]) == set(classes)
    for s in scenes[:50]:
        corner = [o for o in s.objects if o.x < CELL and o.y < CELL]
        assert s.labels()["top_left_shape"] == (corner[0].shape if corner else world.NOTHING)
        assert world.NUMBERS.index(s.labels()["count"]) == len(s.objects)
