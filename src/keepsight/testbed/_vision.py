"""Supervised pretraining of the vision encoder: what is on each patch, and what the whole picture is like."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel

from keepsight.testbed import scenes as world
from keepsight.testbed.drawing import render
from keepsight.testbed.models import PATCH, SIDE
from keepsight.testbed.scenes import Scene, draw_scenes

PATCH_TARGETS = {"shape": world.SHAPES, "color": world.COLORS, "size": world.SIZES}
IMAGE_TARGETS = {
    "texture": world.TEXTURES,
    "orientation": world.ORIENTATIONS,
    "lighting": world.LIGHTINGS,
    "tint": world.TINTS,
}
SEED = 11  # training scenes; held-out scenes have another seed


def to_pixels(pictures: np.ndarray) -> Tensor:
    """uint8 [B, 64, 64, 3] → float [B, 3, 64, 64] in -1 … 1, as the image processor does."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def patch_objects(masks: np.ndarray) -> np.ndarray:
    """Object number on each patch [B, 64] from masks [B, 64, 64]: the object with at least half of it, -1 for a mixed
    patch (less than half one object, less than half background), 0 for background."""
    tiles = masks.reshape(-1, SIDE, PATCH, SIDE, PATCH).transpose(0, 1, 3, 2, 4).reshape(-1, SIDE * SIDE, PATCH**2)
    share = (tiles[..., None] == np.arange(5)).mean(axis=2)  # [B, 64, 5]
    best = share.argmax(axis=-1)
    return np.where(share.max(axis=-1) >= 0.5, best, -1)


def patch_labels(scenes: Sequence[Scene], masks: np.ndarray) -> dict[str, Tensor]:
    """{target: class [B, 64]}: 0 background, k the k-th class, -100 for a mixed patch."""
    owner = patch_objects(masks)
    out = {}
    for target, names in PATCH_TARGETS.items():
        table = np.zeros((len(scenes), 6), dtype=np.int64)  # column 5 is reached by owner -1
        table[:, 5] = -100
        for b, scene in enumerate(scenes):
            for k, o in enumerate(scene.objects, start=1):
                table[b, k] = 1 + names.index(getattr(o, target))
        out[target] = torch.from_numpy(np.take_along_axis(table, np.where(owner < 0, 5, owner), axis=1))
    return out


def image_labels(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """{target: class [B]} of what no sentence speaks about."""
    return {t: torch.tensor([names.index(getattr(s, t)) for s in scenes]) for t, names in IMAGE_TARGETS.items()}


class EncoderTask(nn.Module):
    """The encoder with linear heads: on each patch token, and on the mean of the patch tokens."""

    def __init__(self, encoder: CLIPVisionModel, seed: int) -> None:
        super().__init__()
        width = encoder.config.hidden_size
        self.encoder = encoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.patch = nn.ModuleDict({t: nn.Linear(width, 1 + len(names)) for t, names in PATCH_TARGETS.items()})
            self.image = nn.ModuleDict({t: nn.Linear(width, len(names)) for t, names in IMAGE_TARGETS.items()})

    def features(self, pixels: Tensor) -> Tensor:
        """What LLaVA takes: the patch tokens of the last layer, before the post-norm. [B, 64, 128]"""
        return self.encoder(pixel_values=pixels).last_hidden_state[:, 1:]

    def loss(self, step: int, batch: int) -> tuple[Tensor, str]:
        scenes = draw_scenes(SEED, batch, start=step * batch)
        pictures, masks = render(scenes)
        tokens = self.features(to_pixels(pictures))
        total = tokens.new_zeros(())
        note = []
        for target, labels in patch_labels(scenes, masks).items():
            logits = self.patch[target](tokens)
            # Half of the weight for objects: most patches are background and would drown them.
            for chosen in (labels > 0, labels == 0):
                total = total + F.cross_entropy(logits[chosen], labels[chosen]) / 2
            hit = (logits.argmax(dim=-1) == labels)[labels > 0].float().mean()
            note.append(f"{target} {hit:.3f}")
        pooled = tokens.mean(dim=1)
        for target, labels in image_labels(scenes).items():
            logits = self.image[target](pooled)
            total = total + 0.3 * F.cross_entropy(logits, labels)
            note.append(f"{target} {(logits.argmax(dim=-1) == labels).float().mean():.3f}")
        return total, " ".join(note)
