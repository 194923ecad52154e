"""Stage 1, as LLaVA does it: the projector alone learns captions, encoder and language model frozen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from keepsight.testbed._text import dialogue, pad
from keepsight.testbed._vision import to_pixels
from keepsight.testbed.drawing import render
from keepsight.testbed.language import CAPTION_REQUEST, caption
from keepsight.testbed.models import SIDE
from keepsight.testbed.scenes import Scene, draw_scenes
from keepsight.testbed.tokenizer import vocabulary

SEED = 13
IMAGE_TOKENS = " ".join(["<image>"] * SIDE * SIDE)


@torch.no_grad()
def patch_features(model: LlavaForConditionalGeneration, scenes: Sequence[Scene]) -> Tensor:
    """What the projector reads: the encoder's patch tokens. [B, 64, 128]"""
    tower = model.model.vision_tower
    return tower(pixel_values=to_pixels(render(scenes)[0])).last_hidden_state[:, 1:]


def answer_logits(model: LlavaForConditionalGeneration, features: Tensor, ids: Tensor) -> Tensor:
    """Logits [B, S, V] of conversations `ids` [B, S] whose `<image>` tokens stand for `features` [B, 64, 128]."""
    embedded = model.get_input_embeddings()(ids)
    visual = (ids == vocabulary()["<image>"]).unsqueeze(dim=-1)
    tokens = model.model.multi_modal_projector(features)
    embedded = embedded.masked_scatter(visual, tokens.to(embedded.dtype))
    return model.lm_head(model.model.language_model(inputs_embeds=embedded).last_hidden_state)


def caption_loss(model: LlavaForConditionalGeneration, step: int, batch: int) -> tuple[Tensor, str]:
    """Cross-entropy of the captions of a fresh batch of pictures."""
    scenes = draw_scenes(SEED, batch, start=step * batch)
    ids, said = pad([dialogue(IMAGE_TOKENS, [(CAPTION_REQUEST, caption(scene))]) for scene in scenes])
    logits = answer_logits(model, patch_features(model, scenes), ids)[:, :-1]
    target, answer = ids[:, 1:], said[:, 1:]
    right = (logits.argmax(dim=-1) == target)[answer].float().mean()
    return F.cross_entropy(logits[answer], target[answer]), f"caption tokens {right:.3f}"


class ProjectorTask(nn.Module):
    """The projector's parameters with gradients, everything else without."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        model.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)

    def loss(self, step: int, batch: int) -> tuple[Tensor, str]:
        return caption_loss(self.model, step, batch)
