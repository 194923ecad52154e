"""A procedural world where the truth is known: what is in a scene, and what nobody asks about it.

A scene holds two to four objects, at most one in each quadrant of a 64×64 picture, on a textured, tinted,
unevenly lit background. Objects (shape, colour, size, place) are what captions and questions speak of. The
background's texture, the texture's orientation, the direction of the light and the tint are in every picture and
in no sentence: content that language never asks for, whose fate inside a language model can be watched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

IMAGE_SIZE = 64
CELL = IMAGE_SIZE // 2

SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")
SIZES = ("small", "large")
PLACES = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("zero", "one", "two", "three", "four")

TEXTURES = ("stripes", "bars", "dashes", "waves", "weave", "grain")
# Many near classes each, so that a probe of them has room to fall.
ORIENTATIONS = tuple(f"{15 * k} degrees" for k in range(12))  # of 180: a texture has no front
LIGHTINGS = tuple(f"from {30 * k} degrees" for k in range(12))
TINTS = tuple(f"hue {30 * k}" for k in range(12))

ASKED = ("count", "top_left_shape", "top_left_color")
UNASKED = ("texture", "orientation", "lighting", "tint")
NOTHING = "nothing"


@dataclass(frozen=True)
class SceneObject:
    """One object. `x`, `y`: centre in pixels (pixel centres lie at integers + 0.5); `radius` in pixels."""

    shape: str
    color: str
    size: str
    place: str
    x: float
    y: float
    radius: float

    @property
    def row(self) -> int:
        return PLACES.index(self.place) // 2

    @property
    def column(self) -> int:
        return PLACES.index(self.place) % 2


@dataclass(frozen=True)
class Scene:
    """The whole truth about one picture. Objects are in reading order; object k of the mask is `objects[k - 1]`."""

    seed: int
    index: int
    objects: tuple[SceneObject, ...]
    texture: str
    orientation: str
    lighting: str
    tint: str
    period: float  # of the texture, in pixels
    phase: float  # of the texture, in radians
    contrast: float  # of the texture, in grey levels of 255
    brightness: float  # of the background, in grey levels of 255

    def at(self, place: str) -> SceneObject | None:
        """The object at a place, or None where the place is empty."""
        return next((o for o in self.objects if o.place == place), None)

    def labels(self) -> dict[str, str]:
        """{target: class} for every target of `ASKED` and `UNASKED`."""
        corner = self.at("top left")
        return {
            "count": NUMBERS[len(self.objects)],
            "top_left_shape": corner.shape if corner else NOTHING,
            "top_left_color": corner.color if corner else NOTHING,
            "texture": self.texture,
            "orientation": self.orientation,
            "lighting": self.lighting,
            "tint": self.tint,
        }


def _pick(rng: np.random.Generator, names: Sequence[str]) -> str:
    return names[int(rng.integers(len(names)))]


def draw_scene(seed: int, index: int) -> Scene:
    """Scene number `index` of the world `seed`: the same on every call, in every process, in any order."""
    rng = np.random.default_rng([seed, index])
    taken = sorted(int(p) for p in rng.permutation(4)[: int(rng.integers(2, 5))])
    objects: list[SceneObject] = []
    for place in taken:
        # Repeats are drawn on purpose: counting and comparing need scenes where two objects share a colour.
        repeat = bool(objects) and rng.random() < 0.3
        color = objects[int(rng.integers(len(objects)))].color if repeat else _pick(rng, COLORS)
        size = _pick(rng, SIZES)
        radius = float(rng.uniform(9, 10) if size == "small" else rng.uniform(13.5, 15))
        x, y = rng.uniform(radius, CELL - radius, size=2)
        left, top = CELL * (place % 2), CELL * (place // 2)
        shape = _pick(rng, SHAPES)
        objects.append(SceneObject(shape, color, size, PLACES[place], left + float(x), top + float(y), radius))
    return Scene(
        seed=seed,
        index=index,
        objects=tuple(objects),
        texture=_pick(rng, TEXTURES),
        orientation=_pick(rng, ORIENTATIONS),
        lighting=_pick(rng, LIGHTINGS),
        tint=_pick(rng, TINTS),
        period=float(rng.uniform(6, 9)),
        phase=float(rng.uniform(0, 2 * np.pi)),
        contrast=float(rng.uniform(8, 18)),
        brightness=float(rng.uniform(95, 150)),
    )


def draw_scenes(seed: int, count: int, start: int = 0) -> list[Scene]:
    """Scenes `start` … `start + count - 1` of the world `seed`."""
    return [draw_scene(seed, index) for index in range(start, start + count)]
