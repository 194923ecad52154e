"""Planting in the pixels of every family: with the encoder's attention silenced, an odd patch moves its token only.

At the decoder's input, in the projector's input, and among the pixels that masks go by.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from keepsight.vlm import ImageTokens, Vlm, capture
from keepsight.vlm.features import encoder_of, image_features, on_token_grid, projector_of
from keepsight.vlm.geometry import token_pixels
from tests.families import FAMILIES, WORKING

PLACED = [name for name in WORKING if FAMILIES[name].places]
PADDED = {"Pixtral", "Mistral 3", "Idefics3", "SmolVLM"}  # a batch pads their pictures: the last one alone


def silence(vlm: Vlm) -> None:
    """Every patch sees itself alone."""
    silent = 0
    for name, module in encoder_of(vlm).named_modules():
        in_layer = "layer" in name or "blocks" in name  # and not in a pooling head
        if in_layer and name.endswith(("out_proj", "attn.proj", "projection_layer", "o_proj")):
            torch.nn.init.zeros_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
            silent += 1
    assert silent == 2, "one a layer"


def alone(name: str, batch: dict[str, Any]) -> dict[str, Any]:
    """The second sample, without what pads it."""
    if name not in PADDED:
        return batch
    batch = {key: value[-1:] for key, value in batch.items()}
    kept = batch["attention_mask"][0].bool()
    for key in ("input_ids", "attention_mask"):
        batch[key] = batch[key][:, kept]
    if "image_sizes" in batch:
        height, width = batch["image_sizes"][0].tolist()
        batch["pixel_values"] = batch["pixel_values"][..., :height, :width]
    else:
        batch["pixel_values"] = batch["pixel_values"][:, :1]
    return batch


class Look:
    """What a forward shows of each visual token: ``[T, d]`` at the decoder's input, and at the projector's."""

    def __init__(self, vlm: Vlm, batch: dict[str, Any]) -> None:
        self.given: Tensor | None = None
        hooks = []
        if vlm.family != "ovis2":  # which has no module that takes features to the decoder's width
            hooks.append(projector_of(vlm).register_forward_pre_hook(self._take, with_kwargs=True))
        with torch.no_grad(), capture(vlm, [0]) as taken:
            vlm.forward_core(**batch)
        for hook in hooks:
            hook.remove()
        self.states = taken.states[0]
        tokens = vlm.image_tokens(batch)
        self.before = None if self.given is None else on_token_grid(vlm, self.given, tokens, batch)
        self.pixels = token_pixels(vlm, batch)

    def _take(self, module: Any, args: Any, kwargs: Any) -> None:
        self.given = args[0] if args else next(value for value in kwargs.values() if torch.is_tensor(value))


def moved(before: Tensor, after: Tensor) -> list[int]:
    change = (after - before).abs().amax(dim=1)
    return (change > 1e-5).nonzero().flatten().tolist()


def nearby(tokens: ImageTokens, found: list[int], place: int) -> bool:
    """For an encoder that ends in convolutions: whether the token moved, and no other than its neighbours."""
    same = [(tokens.image[i], tokens.tile[i]) == (tokens.image[place], tokens.tile[place]) for i in found]
    apart = [max(abs(int(t[i] - t[place])) for t in (tokens.row, tokens.column)) for i in found]
    return place in found and all(same) and max(apart) <= 1


QUICK = {"LLaVA (CLIP + Llama)", "LLaVA-NeXT", "Qwen2.5-VL", "InternVL", "SmolVLM", "Gemma 3"}
EACH = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PLACED]


@pytest.mark.parametrize("name", EACH)
def test_an_odd_patch_moves_its_token_and_no_other(name):
    model, batch = FAMILIES[name].make()
    vlm, batch = Vlm(model), alone(name, batch)
    silence(vlm)
    base, tokens = Look(vlm, batch), vlm.image_tokens(batch)
    pixels = batch["pixel_values"]
    patch = 16 if vlm.family == "got_ocr2" else 4
    flat = pixels.reshape(-1, *pixels.shape[-3:]) if pixels.dim() > 2 else pixels
    generator, hits = torch.Generator().manual_seed(0), 0
    by_patch = "image_grid_thw" in batch
    for _ in range(16):
        odd = flat.clone()
        where = int(torch.randint(len(flat), (), generator=generator))
        rows, columns = (1, 1) if by_patch else (flat.shape[-2] // patch, flat.shape[-1] // patch)
        row, column = (int(torch.randint(n, (), generator=generator)) for n in (rows, columns))
        if by_patch:
            odd[where] += 3.0
        else:
            odd[where][:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] += 3.0
        after = Look(vlm, {**batch, "pixel_values": odd.reshape(pixels.shape)})
        places = moved(base.pixels, after.pixels)
        found = moved(base.states, after.states)
        if vlm.family == "got_ocr2":
            assert nearby(tokens, found, places[0])
            assert nearby(tokens, moved(base.before, after.before), places[0])
        else:
            assert found == places
            assert base.before is None or moved(base.before, after.before) == places
        if vlm.family.startswith("llava_") and not places:
            continue  # in a padding tile, or cut off with the mosaic's padding
        assert len(places) == 1
        hits += 1
        token = places[0]
        if by_patch or vlm.family.startswith("llava_"):
            continue  # written out by hand elsewhere
        grid_rows, grid_columns = tokens.grids[int(tokens.image[token])][int(tokens.tile[token])]
        assert (int(tokens.row[token]), int(tokens.column[token])) == (
            row * grid_rows // rows,
            column * grid_columns // columns,
        )
        tiles = [(image, tile) for image, grids in enumerate(tokens.grids) for tile in range(len(grids))]
        assert (int(tokens.image[token]), int(tokens.tile[token])) == tiles[where]
    assert hits >= 4


@pytest.mark.parametrize("name", WORKING)
def test_features_asked_for_are_those_at_the_decoders_input(name):
    model, batch = FAMILIES[name].make()
    vlm = Vlm(model)
    with torch.no_grad(), capture(vlm, [0]) as taken:
        vlm.forward_core(**batch)
        features = image_features(vlm, batch)
    torch.testing.assert_close(features, taken.states[0], rtol=1e-5, atol=1e-6)
