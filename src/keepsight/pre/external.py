"""An external vision model as the anchor, sampled where the visual tokens look.

Its pixels come from the picture itself by its own preprocessing, never from the MLLM's normalised pixels. Where in the
picture a visual token looks is found by sending a picture *of the coordinates* through the MLLM's own image processor,
so that resize, crop, padding and tiles are followed in every family. Ours; the idea of the anchor is VIRAL's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers.integrations import deepspeed

from keepsight.results import fingerprint
from keepsight.vlm.chat import render_prompt
from keepsight.vlm.geometry import token_centres
from keepsight.vlm.view import Vlm

PIXELS, POINTS = "keepsight_pixels", "keepsight_points"  # what the batch carries for the anchor


@contextmanager
def _loaded_whole() -> Iterator[None]:
    """Under ZeRO-3's settings, which `TrainingArguments` make known, transformers loads any model in shards; this one
    belongs to no engine that would gather them."""
    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


class ExternalEncoder:
    """A frozen vision model of transformers with a square grid of patches (DINOv2, CLIP, SigLIP, ViT, …).

    Args:
        name: directory or hub id.
        layer: which of its hidden states; -1 = the last, before any final norm or pooling of the model.

    Raises:
        ValueError: weights are missing from the checkpoint, so that part of the encoder would be random; a layer that
            it does not have; hidden states that do not hold a token for each patch of a square grid (Swin, ConvNeXt).
    """

    def __init__(self, name: str, layer: int = -1) -> None:
        from transformers import AutoModel
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        with (
            _loaded_whole(),
            torch.random.fork_rng(devices=[]),
        ):  # what a checkpoint lacks is drawn, and training must not notice
            model, report = AutoModel.from_pretrained(name, output_loading_info=True, use_safetensors=True)
        model = getattr(model, "vision_model", model)  # CLIP and SigLIP: the half that sees
        # A classifier's checkpoint (ViT) has no pooler; hidden states do not need one.
        missing = sorted(key for key in report["missing_keys"] if not {"position_ids", "pooler"} & set(key.split(".")))
        if missing:
            raise ValueError(
                f"{name!r} lacks the weights of {missing[:3]} ({len(missing)} in all), so the anchor would be partly "
                "random; give a checkpoint of the bare vision model."
            )
        processor = AutoImageProcessor.from_pretrained(name)
        config = model.config
        size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
        if not (isinstance(size, int) and isinstance(patch, int)):
            raise ValueError(
                f"{name!r} ({config.model_type}) has image_size {size!r} and patch_size {patch!r}; an external anchor "
                "needs a vision model with one square picture size and patch size."
            )
        self.name, self.layer = name, layer
        # As the processor's crop would have it, in whole patches: the position embeddings then fit.
        crop = getattr(processor, "crop_size", None) or {}
        side = crop.get("height") or size
        self.grid = side // patch
        self.side = self.grid * patch
        self.mean = torch.tensor(processor.image_mean).view(3, 1, 1)
        self.deviation = torch.tensor(processor.image_std).view(3, 1, 1)
        self.kind = model.config.model_type
        self.model: nn.Module = model.eval().requires_grad_(False)
        self.width = self._try()
        self.initial = fingerprint(model)
        self._centres: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def _try(self) -> int:
        """The channels of the layer, found by one forward of a blank picture, in which all else is checked."""
        asked = f"anchor_layer is {self.layer} and anchor_model {self.name!r} ({self.kind})"
        pixels = torch.zeros(1, 3, self.side, self.side, device=next(self.model.parameters()).device)
        try:
            states = self.model(pixel_values=pixels, output_hidden_states=True).hidden_states
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{asked}, which does not take a picture of {self.side} × {self.side} and give its hidden states "
                f"({error}); an external anchor needs a vision model that does."
            ) from error
        count = len(states or ())
        if not -count <= self.layer < count:
            raise ValueError(
                f"{asked}, which gives {count} hidden states: choose one from 0 (what enters its first layer) to "
                f"{count - 1}, or from -{count} to -1, counted from the end."
            )
        shape = tuple(states[self.layer].shape)
        if len(shape) != 3 or shape[1] < self.grid**2:
            raise ValueError(
                f"{asked}, whose hidden state there has shape {shape}; an external anchor needs [1, tokens, channels] "
                f"with a token for each of the {self.grid} × {self.grid} patches, as DINOv2, CLIP, SigLIP and ViT have."
            )
        return int(shape[2])

    def prepare(self, images: list[Image.Image], processor: Any, vlm: Vlm) -> dict[str, Tensor]:
        """What a batch must carry: pixels ``[n, 3, side, side]`` and token centres ``[T, 2]`` (x, y in 0 … 1)."""
        pixels, points = [], []
        for image in images:
            # The whole picture, squeezed into the square: then a place in it is a place in the feature map.
            resized = image.convert("RGB").resize((self.side, self.side), Image.Resampling.BICUBIC)
            array = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
            pixels.append((array - self.mean) / self.deviation)
            if image.size not in self._centres:
                self._centres[image.size] = token_centres(processor, vlm, *image.size, render_prompt(processor, ""))
            points.append(self._centres[image.size])
        return {PIXELS: torch.stack(pixels), POINTS: torch.cat(points)}

    @torch.no_grad()
    def features(self, pixels: Tensor, points: Tensor, counts: list[int]) -> Tensor:
        """``[T, d']``: the feature map of each picture, interpolated at the centres of its visual tokens.

        Args:
            pixels: ``[n, 3, side, side]``; points: ``[T, 2]``; counts: visual tokens of each picture, n numbers.

        Raises:
            ValueError: numbers of pictures or tokens that do not fit.
        """
        if len(pixels) != len(counts) or len(points) != sum(counts):
            raise ValueError(
                f"the batch holds {len(counts)} pictures with {sum(counts)} visual tokens, but {len(pixels)} pictures "
                f"with {len(points)} token centres for the external anchor: make both from the same pictures with "
                "handle.prepare(images, processor)."
            )
        self.model.to(pixels.device)
        output = self.model(pixel_values=pixels, output_hidden_states=True)
        states = output.hidden_states[self.layer][:, -(self.grid**2) :]  # class and register tokens come first
        maps = states.transpose(1, 2).reshape(len(pixels), self.width, self.grid, self.grid).float()
        found = []
        for feature_map, places in zip(maps, points.to(maps).split(counts), strict=True):
            where = (2 * places - 1)[None, None]  # [1, 1, N, 2], -1 … 1 from edge to edge
            sampled = F.grid_sample(feature_map[None], where, padding_mode="border", align_corners=False)
            found.append(sampled[0, :, 0].T)
        return torch.cat(found)

    def unchanged(self) -> bool:
        """Whether the weights are those that were loaded."""
        return fingerprint(self.model) == self.initial
