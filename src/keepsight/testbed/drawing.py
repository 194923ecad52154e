"""Scenes to pictures and exact masks, many at a time with numpy. Edges are hard: a mask is exactly what was painted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from keepsight.testbed.scenes import (
    COLORS,
    IMAGE_SIZE,
    LIGHTINGS,
    ORIENTATIONS,
    SHAPES,
    TEXTURES,
    TINTS,
    Scene,
)

PALETTE = {
    "red": (214, 48, 44),
    "green": (52, 168, 60),
    "blue": (48, 80, 216),
    "yellow": (228, 206, 52),
    "purple": (156, 56, 190),
    "cyan": (56, 196, 208),
}
TINT_STRENGTH = 3.0  # grey levels
LIGHT_STRENGTH = 0.08  # share of the brightness, from the centre to the lit edge
NOISE = 13.0  # standard deviation in grey levels, the same in the three channels of a pixel
CHUNK = 256


def inside(shape: str, dx: np.ndarray, dy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Whether points at (dx right, dy down) from an object's centre belong to it. Any broadcastable shapes → bool.

    Raises:
        ValueError: for a shape that the world does not have.
    """
    ax, ay = np.abs(dx), np.abs(dy)
    if shape == "circle":
        return dx**2 + dy**2 <= radius**2
    if shape == "ring":
        distance = dx**2 + dy**2
        return (distance <= radius**2) & (distance >= (0.5 * radius) ** 2)
    if shape == "square":
        return np.maximum(ax, ay) <= 0.82 * radius
    if shape == "diamond":
        return ax + ay <= radius
    if shape == "cross":
        return (np.maximum(ax, ay) <= radius) & (np.minimum(ax, ay) <= 0.34 * radius)
    if shape == "triangle":  # apex up; the base at 0.75 radius below the centre
        return (dy <= 0.75 * radius) & (ax <= 0.55 * (dy + radius))
    raise ValueError(f"unknown shape {shape!r}; the world has {', '.join(SHAPES)}")


def _column(scenes: Sequence[Scene], values: Sequence[float]) -> np.ndarray:
    return np.asarray(values, dtype=np.float64).reshape(len(scenes), 1, 1)


def _texture(scenes: Sequence[Scene], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Texture of every scene in -1 … 1, before contrast. [B, S, S]"""
    angle = _column(scenes, [np.pi * ORIENTATIONS.index(s.orientation) / len(ORIENTATIONS) for s in scenes])
    period = _column(scenes, [s.period for s in scenes])
    phase = _column(scenes, [s.phase for s in scenes])
    u = 2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period + phase  # across the texture
    v = 2 * np.pi * (y * np.cos(angle) - x * np.sin(angle)) / period + 2 * phase  # along it
    kinds = {
        "stripes": lambda u, v: np.sin(u),
        "bars": lambda u, v: np.where(np.sin(u) > 0.45, 1.2, -0.6),
        "dashes": lambda u, v: np.sin(u) * np.where(np.sin(v / 1.7) > 0, 1.3, 0.15),
        "waves": lambda u, v: np.sin(u + 1.3 * np.sin(v / 2.2)),
        "weave": lambda u, v: 0.85 * np.sin(u) + 0.45 * np.sin(1.3 * v),
        "grain": lambda u, v: (np.sin(u) + np.sin(1.31 * u + 0.31 * v + 1) + np.sin(0.77 * u - 0.29 * v)) / 1.7,
    }
    out = np.empty(u.shape)
    which = np.array([TEXTURES.index(s.texture) for s in scenes])
    for k, name in enumerate(TEXTURES):
        out[which == k] = kinds[name](u[which == k], v[which == k])
    return out


def _paint(scenes: Sequence[Scene]) -> tuple[np.ndarray, np.ndarray]:
    size = IMAGE_SIZE
    y, x = np.mgrid[0:size, 0:size] + 0.5
    grey = _column(scenes, [s.brightness for s in scenes])
    grey = grey + _column(scenes, [s.contrast for s in scenes]) * _texture(scenes, x, y)
    hue = 2 * np.pi * np.array([TINTS.index(s.tint) for s in scenes]) / len(TINTS)
    tint = TINT_STRENGTH * np.cos(hue[:, None] - 2 * np.pi * np.arange(3) / 3)  # [B, 3]
    picture = grey[..., None] + tint[:, None, None, :]

    mask = np.zeros((len(scenes), size, size), dtype=np.uint8)
    flat = [(b, k, o) for b, scene in enumerate(scenes) for k, o in enumerate(scene.objects, start=1)]
    for shape in SHAPES:
        chosen = [(b, k, o) for b, k, o in flat if o.shape == shape]
        if not chosen:
            continue
        cx, cy, radius = (
            np.array([getattr(o, name) for _, _, o in chosen])[:, None, None] for name in ("x", "y", "radius")
        )
        covered = inside(shape, x - cx, y - cy, radius)
        for (b, k, _), pixels in zip(chosen, covered, strict=True):
            mask[b][pixels] = k
    paint = np.array([PALETTE[c] for c in COLORS], dtype=np.float64)
    for b, k, o in flat:
        picture[b][mask[b] == k] = paint[COLORS.index(o.color)]

    angle = 2 * np.pi * np.array([LIGHTINGS.index(s.lighting) for s in scenes]) / len(LIGHTINGS)
    angle = angle[:, None, None]
    slope = ((x - size / 2) * np.cos(angle) + (y - size / 2) * np.sin(angle)) / (size / 2)
    picture *= (1 + LIGHT_STRENGTH * slope)[..., None]
    for b, scene in enumerate(scenes):
        noise = np.random.default_rng([scene.seed, scene.index, 1]).standard_normal((size, size), dtype=np.float32)
        picture[b] += NOISE * noise[..., None]
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8), mask


def render(scenes: Sequence[Scene]) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [B, 64, 64, 3] and masks uint8 [B, 64, 64] (0 background, k = object k of the scene)."""
    parts = [_paint(scenes[start : start + CHUNK]) for start in range(0, len(scenes), CHUNK)]
    return np.concatenate([p for p, _ in parts]), np.concatenate([m for _, m in parts])


def picture(scene: Scene) -> Image.Image:
    """The scene as an RGB PIL image of 64×64 pixels."""
    return Image.fromarray(render([scene])[0][0])


def mask(scene: Scene) -> np.ndarray:
    """Exact object mask of the scene, uint8 [64, 64]."""
    return render([scene])[1][0]
