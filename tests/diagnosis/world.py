"""A tiny LLaVA with a real processor, and pictures of two halves whose class is a colour: no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from keepsight.diagnosis import DEFAULT_PROMPT
from tests.tiny import IMAGE, TEXT, llava
from tests.tiny_processors import make_llava

SIDE, PATCH = 32, 4
TOKENS = (SIDE // PATCH) ** 2
LAYERS, WIDTH = TEXT["num_hidden_layers"], TEXT["hidden_size"]
COLOURS = {"blue": (40, 60, 220), "green": (30, 190, 60), "red": (220, 40, 40)}


def tiny_llava(seed: int = 0) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    return llava(SIDE, PATCH, seed), make_llava(side=SIDE, patch=PATCH)


def plant_sinks(model: Any, processor: Any, folder: Path, share: float = 0.003) -> None:
    """Weights of the projector that make sinks of this share of the patches in `folder`: some pictures have none."""
    given: list[torch.Tensor] = []
    first, second = model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2
    hook = first.register_forward_pre_hook(lambda module, args: given.append(args[0].flatten(0, -2)))
    for path in sorted(folder.rglob("*.png")):
        states_alone(model, processor, Image.open(path))
    hook.remove()
    with torch.no_grad():  # a unit that is silent below the quantile, and rises steeply above it
        scores = torch.cat(given) @ first.weight[0]
        steep = 50.0 / scores.std()
        first.bias[0] = -steep * scores.quantile(1 - share)
        first.weight[0] *= steep
        second.weight[:, 0] = 100.0


def states_alone(model: Any, processor: Any, image: Image.Image) -> torch.Tensor:
    """[L + 1, N, d] of one picture with the whole prompt, by transformers' own means."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": DEFAULT_PROMPT}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    last = []
    # transformers' last hidden state is the one after the norm.
    hook = model.get_decoder().norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states
    hook.remove()
    visual = inputs["input_ids"][0] == IMAGE
    if hasattr(model.model, "image_newline"):
        visual &= ~(hidden[0][0] == model.model.image_newline).all(dim=-1)
    return torch.stack([*(state[0, visual] for state in hidden[:-1]), last[0][0, visual]])


def picture(colour: str, seed: int) -> tuple[Image.Image, np.ndarray]:
    """Left half in the class's colour, a grey bar at the right, noise everywhere; mask 1 left, 2 the bar."""
    generator = np.random.default_rng(seed)
    pixels = np.full((SIDE, SIDE, 3), 120.0)
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    pixels[:, : SIDE // 2] = COLOURS[colour]
    mask[:, : SIDE // 2] = 1
    pixels[:, SIDE - 8 :] = 200
    mask[:, SIDE - 8 :] = 2
    pixels += generator.normal(0, 25, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask


def write_world(folder: Path, per_class: int = 8) -> tuple[Path, Path]:
    """An ImageFolder and its masks, subfolders mirrored."""
    for c, colour in enumerate(COLOURS):
        for kind in ("images", "masks"):
            (folder / kind / colour).mkdir(parents=True)
        for i in range(per_class):
            image, mask = picture(colour, 100 * c + i)
            image.save(folder / "images" / colour / f"{i:02d}.png")
            Image.fromarray(mask).save(folder / "masks" / colour / f"{i:02d}.png")
    return folder / "images", folder / "masks"
