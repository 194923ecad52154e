"""How good the shipped parts are, on scenes that no training saw."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from keepsight.testbed import models
from keepsight.testbed._text import text_accuracy
from keepsight.testbed._vision import image_labels, patch_labels, to_pixels
from keepsight.testbed.drawing import render
from keepsight.testbed.scenes import draw_scenes

HELD_OUT = 1001
PROBE_TRAIN, PROBE_TEST = 600, 300  # pictures


def linear_accuracy(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, l2: float = 1e-3) -> float:
    """Test accuracy of a multinomial logistic regression (L-BFGS) on standardised features. x [N, D], y [N]."""
    mean, spread = x.mean(dim=0), x.std(dim=0).clamp_min(1e-6)
    x, x_test = (x - mean) / spread, (x_test - mean) / spread
    weight = torch.zeros(int(y.max()) + 1, x.shape[1] + 1, requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=150, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight[:, 1:].T + weight[:, 0], y) + l2 * weight[:, 1:].square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    with torch.no_grad():
        chosen = (x_test @ weight[:, 1:].T + weight[:, 0]).argmax(dim=-1)
    return float((chosen == y_test).float().mean())


def evaluate(folder: Path = models.WEIGHTS) -> dict[str, float]:
    """Accuracies on held-out scenes: linear probes of the encoder, text questions to each language model."""
    scenes = draw_scenes(HELD_OUT, PROBE_TRAIN + PROBE_TEST)
    pictures, masks = render(scenes)
    encoder = models.load_encoder(folder)
    with torch.no_grad():
        tokens = torch.cat([encoder(pixel_values=part).last_hidden_state for part in to_pixels(pictures).split(100)])
    tokens = tokens[:, 1:]  # [B, 64, 128]
    cut = PROBE_TRAIN
    out = {}
    for target, labels in patch_labels(scenes, masks).items():
        on, on_test = labels[:cut] > 0, labels[cut:] > 0
        out[f"encoder, object patches: {target}"] = linear_accuracy(
            tokens[:cut][on], labels[:cut][on] - 1, tokens[cut:][on_test], labels[cut:][on_test] - 1
        )
    pooled = tokens.mean(dim=1)
    for target, labels in image_labels(scenes).items():
        out[f"encoder, mean of the patches: {target}"] = linear_accuracy(
            pooled[:cut], labels[:cut], pooled[cut:], labels[cut:], l2=1e-2
        )
    for language in models.LANGUAGES:
        if (folder / f"{language}.safetensors").is_file():
            lm = models.load_language_model(language, folder)
            out[f"{language}, questions about a described scene"] = text_accuracy(lm, scenes[cut : cut + 150])
    return out
