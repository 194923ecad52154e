"""Planting: with the encoder's attention silenced, an odd patch must move exactly the token that stands for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    GotOcr2ImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaOnevisionImageProcessorPil,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
    SmolVLMImageProcessorPil,
)

from keepsight.vlm import ImageTokens, Vlm, capture
from keepsight.vlm.geometry import patch_coverage
from tests.families import PINPOINTS, llava_next, llava_onevision
from tests.tiny import CLOSE, FAMILIES, IMAGE, OPEN

FIXED = {"height": 16, "width": 16}


@dataclass
class Case:
    """A family's image processor at tiny size, and how its processor writes the placeholders of one picture."""

    image_processor: Any
    placeholders: Callable[[Any], list[int]]
    tiles: int = 1  # of the 16 × 16 or 16 × 32 pictures below


def _internvl(batch: Any) -> list[int]:
    return [OPEN, *[IMAGE] * (4 * len(batch["pixel_values"])), CLOSE]


def _smolvlm(batch: Any) -> list[int]:
    tiles = batch["pixel_values"].shape[1]
    ids = []
    for tile in range(tiles - 1):
        ids += [90, 92 + tile, *[IMAGE] * 4]
    return [*ids, 95, 90, 91, *[IMAGE] * 4, 90]


def _qwen(batch: Any) -> list[int]:
    return [OPEN, *[IMAGE] * (int(batch["image_grid_thw"].prod()) // 4), CLOSE]


SQUARE = {
    "llava-clip-llama": Case(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=FIXED), lambda _: [IMAGE] * 16
    ),
    "llava-siglip-qwen2": Case(SiglipImageProcessorPil(size=FIXED), lambda _: [IMAGE] * 16),
    "gemma3": Case(Gemma3ImageProcessorPil(size=FIXED), lambda _: [OPEN, *[IMAGE] * 4, CLOSE]),
    "internvl": Case(GotOcr2ImageProcessorPil(size=FIXED, crop_to_patches=False), _internvl),
    "smolvlm": Case(
        SmolVLMImageProcessorPil(
            size={"longest_edge": 16}, max_image_size={"longest_edge": 16}, do_image_splitting=False
        ),
        _smolvlm,
    ),
    "qwen2.5-vl": Case(
        Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 16 * 32}), _qwen
    ),
}
TILED = {
    "internvl": Case(
        GotOcr2ImageProcessorPil(size=FIXED, crop_to_patches=True, min_patches=2, max_patches=2), _internvl, 3
    ),
    "smolvlm": Case(
        SmolVLMImageProcessorPil(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 16}, do_image_splitting=True
        ),
        _smolvlm,
        3,
    ),
}


NEWLINES = {
    "llava-next": LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size=FIXED, image_grid_pinpoints=PINPOINTS
    ),
    "llava-onevision": LlavaOnevisionImageProcessorPil(size=FIXED, image_grid_pinpoints=PINPOINTS),
}


def pictures_only(image_processor: Any) -> Callable[..., Any]:
    """A processor of which only the pictures matter: no text, no tokenizer."""
    return lambda images, text, return_tensors, images_kwargs: image_processor(
        images=[image for sample in images for image in sample], return_tensors=return_tensors, **images_kwargs
    )


def silenced(family: str) -> Vlm:
    """The tiny model with the vision encoder's attention output set to zero: every patch sees itself alone."""
    model, _ = {**FAMILIES, "llava-next": llava_next, "llava-onevision": llava_onevision}[family]()
    encoder = model.get_encoder(modality="image")
    silent = 0
    for name, module in encoder.named_modules():
        in_layer = "layer" in name or "blocks" in name  # and not in the pooling head of SigLIP
        if in_layer and name.endswith(("out_proj", "attn.proj", "projection_layer")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
            silent += 1
    assert silent == 2, "one a layer"
    return Vlm(model)


def first_states(vlm: Vlm, case: Case, picture: np.ndarray) -> tuple[torch.Tensor, ImageTokens]:
    batch = dict(case.image_processor(images=[Image.fromarray(picture)], return_tensors="pt"))
    batch.pop("rows", None), batch.pop("cols", None), batch.pop("num_patches", None)
    ids = torch.tensor([[1, *case.placeholders(batch), 5]])
    batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if vlm.family == "qwen2_5_vl":
        batch["mm_token_type_ids"] = (ids == IMAGE).int()
    if vlm.family == "gemma3":
        batch["token_type_ids"] = (ids == IMAGE).long()
    with torch.no_grad(), capture(vlm, [0]) as taken:
        vlm.forward_core(**batch)
    return taken.states[0], vlm.image_tokens(batch)


def planted(vlm: Vlm, case: Case, mask: np.ndarray) -> tuple[list[int], torch.Tensor, ImageTokens]:
    """Tokens that move when the masked pixels change, the coverage of the mask, and the tokens."""
    grey = np.full((*mask.shape, 3), 100, np.uint8)
    odd = grey.copy()
    odd[mask == 1] = (250, 10, 60)
    before, tokens = first_states(vlm, case, grey)
    after, _ = first_states(vlm, case, odd)
    moved = (after - before).abs().amax(dim=1) > 1e-5
    _, coverage = patch_coverage(pictures_only(case.image_processor), vlm, mask, "")
    assert coverage.shape == (1, len(before))
    return moved.nonzero().flatten().tolist(), coverage[0], tokens


@pytest.mark.parametrize("family", SQUARE)
def test_an_odd_patch_moves_exactly_its_token(family):
    vlm, case = silenced(family), SQUARE[family]
    _, tokens = first_states(vlm, case, np.zeros((16, 16, 3), np.uint8))
    rows, columns = tokens.grids[0][0]
    side = 16 // rows
    for row in range(rows):
        for column in range(columns):
            mask = np.zeros((16, 16), np.uint8)
            mask[row * side : (row + 1) * side, column * side : (column + 1) * side] = 1
            moved, coverage, tokens = planted(vlm, case, mask)
            assert len(moved) == 1
            assert (tokens.row[moved[0]], tokens.column[moved[0]]) == (row, column)
            expected = torch.zeros(rows * columns)
            expected[moved[0]] = 1.0
            assert torch.allclose(coverage, expected, atol=1e-3)


@pytest.mark.parametrize("family", TILED)
def test_tiles_and_thumbnail_are_told_apart(family):
    vlm, case = silenced(family), TILED[family]
    mask = np.zeros((16, 32), np.uint8)  # two tiles of 16 × 16, side by side, then a thumbnail of the whole
    mask[8:16, 16:24] = 1  # second tile: row 1, column 0
    moved, coverage, tokens = planted(vlm, case, mask)
    assert tokens.grids == (((2, 2),) * 3,)
    assert tokens.thumbnail.tolist() == [False] * 8 + [True] * 4
    in_tiles = [i for i in moved if not tokens.thumbnail[i]]
    assert [(int(tokens.tile[i]), int(tokens.row[i]), int(tokens.column[i])) for i in in_tiles] == [(1, 1, 0)]
    assert coverage[~tokens.thumbnail].tolist() == pytest.approx([0, 0, 0, 0, 0, 0, 1, 0], abs=1e-3)
    # The thumbnail squeezes 16 × 32 into a square: the object fills half of its lower right token.
    assert coverage[tokens.thumbnail].tolist() == pytest.approx([0, 0, 0, 0.5], abs=0.13)
    assert sum(coverage[tokens.thumbnail]) == pytest.approx(0.5, abs=0.1)


# Height and width of a picture; then the mosaic's tokens, and the picture's pixels left and above of the first of them.
# A mosaic of two tiles has 4 × 8 tokens of 4 × 4 pixels. Of a picture 8 pixels high, the first and last row of tokens
# are padding; of one 10 pixels high, they hold one row of the picture each, and are cut off with the padding.
@pytest.mark.parametrize("family", NEWLINES)
@pytest.mark.parametrize(
    ("size", "grid", "start"),
    [((32, 32), (8, 8), (0, 0)), ((8, 32), (2, 8), (0, 0)), ((32, 8), (8, 2), (0, 0)), ((10, 32), (2, 8), (0, 1))],
)
@pytest.mark.slow
def test_mosaics_without_padding_and_newlines(family, size, grid, start):
    vlm = silenced(family)
    case = Case(NEWLINES[family], lambda _: [IMAGE] * (16 + grid[0] * (grid[1] + 1)))
    left, top = start
    for row in range(grid[0]):
        for column in range(grid[1]):
            mask = np.zeros(size, np.uint8)
            mask[top + 4 * row :, left + 4 * column :][:4, :4] = 1
            moved, coverage, tokens = planted(vlm, case, mask)
            assert tokens.grids == (((4, 4), grid),)
            # The whole comes first; then a newline after each row.
            assert tokens.position.tolist() == [
                *range(1, 17),
                *(17 + (grid[1] + 1) * r + c for r in range(grid[0]) for c in range(grid[1])),
            ]
            assert torch.equal(tokens.thumbnail, torch.arange(len(coverage)) < 16)
            in_mosaic = [i for i in moved if not tokens.thumbnail[i]]
            assert [(int(tokens.tile[i]), int(tokens.row[i]), int(tokens.column[i])) for i in in_mosaic] == [
                (1, row, column)
            ]
            expected = torch.zeros(grid[0] * grid[1])
            expected[row * grid[1] + column] = 1.0
            assert torch.allclose(coverage[16:], expected, atol=1e-3)
            # The whole is the picture squeezed into 16 × 16 pixels.
            whole = coverage[:16].view(4, 4)
            assert float(whole.sum() / 16) == pytest.approx(16 / (size[0] * size[1]), abs=0.02)


@pytest.mark.parametrize("family", NEWLINES)
def test_what_unpadding_cuts_off_is_in_the_whole_only(family):
    vlm, case = silenced(family), Case(NEWLINES[family], lambda _: [IMAGE] * (16 + 2 * 9))
    mask = np.zeros((10, 32), np.uint8)
    mask[:1] = 1
    moved, coverage, tokens = planted(vlm, case, mask)
    assert moved
    assert all(bool(tokens.thumbnail[i]) for i in moved)
    assert float(coverage[16:].sum()) == pytest.approx(0.0, abs=1e-6)


def test_large_mosaics_are_shrunk_as_the_model_shrinks_them():
    vlm, case = silenced("llava-onevision"), Case(NEWLINES["llava-onevision"], lambda _: [IMAGE] * (16 + 5 * 6))
    vlm.config.vision_aspect_ratio = "anyres_max_2"  # 8 × 8 tokens become 5 × 5
    mask = np.zeros((32, 32), np.uint8)
    mask[16:, :16] = 1
    moved, coverage, tokens = planted(vlm, case, mask)
    assert tokens.grids == (((4, 4), (5, 5)),)
    assert set(moved) == set((coverage > 1e-6).nonzero().flatten().tolist())
    assert (coverage[16:].view(5, 5) >= 0.5).nonzero().tolist() == [[3, 0], [3, 1], [4, 0], [4, 1]]


def test_what_the_crop_cuts_off_covers_nothing():
    vlm, case = silenced("llava-clip-llama"), SQUARE["llava-clip-llama"]
    mask = np.zeros((16, 32), np.uint8)  # the centre crop keeps columns 8 to 23
    mask[:, :8] = 1
    assert planted(vlm, case, mask)[0] == []
    assert float(planted(vlm, case, mask)[1].sum()) == pytest.approx(0.0, abs=1e-6)
    mask = np.zeros((16, 32), np.uint8)
    mask[0:4, 8:12] = 1
    moved, coverage, _ = planted(vlm, case, mask)
    assert moved == [0]
    assert coverage[0] == pytest.approx(1.0, abs=1e-3)


def test_masks_follow_a_resize():
    vlm, case = silenced("llava-clip-llama"), SQUARE["llava-clip-llama"]
    mask = np.zeros((64, 64), np.uint8)
    mask[0:16, 16:32] = 1  # row 0, column 1 of the 4 × 4 grid
    _, coverage, _ = planted(vlm, case, mask)
    expected = torch.zeros(16)
    expected[1] = 1.0
    # The resampling kernel blurs borders by a fraction of a pixel of 16.
    assert torch.allclose(coverage, expected, atol=0.2)
    assert (coverage >= 0.5).nonzero().flatten().tolist() == [1]


def test_qwen_follows_non_square_pictures():
    vlm, case = silenced("qwen2.5-vl"), SQUARE["qwen2.5-vl"]
    mask = np.zeros((16, 24), np.uint8)
    mask[8:16, 16:24] = 1
    moved, coverage, tokens = planted(vlm, case, mask)
    assert tokens.grids == (((2, 3),),)
    assert moved == [5]
    assert coverage.tolist() == pytest.approx([0, 0, 0, 0, 0, 1], abs=1e-3)


def test_many_objects_ignored_values_and_shares_by_hand():
    vlm, case = silenced("llava-clip-llama"), SQUARE["llava-clip-llama"]
    mask = np.zeros((16, 16), np.uint8)
    mask[0:4, 0:2] = 7  # half of patch 0
    mask[0:4, 4:8] = 3  # patch 1
    mask[4:8, 0:1] = 9  # a quarter of patch 4
    mask[4:8, 4:8] = 12  # patch 5
    mask[12:16, 12:16] = 255
    objects, coverage = patch_coverage(pictures_only(case.image_processor), vlm, mask, "")
    assert objects == [3, 7, 9, 12]
    expected = torch.zeros(4, 16)
    expected[0, 1], expected[1, 0], expected[2, 4], expected[3, 5] = 1.0, 0.5, 0.25, 1.0
    assert torch.allclose(coverage, expected, atol=1e-3)


def test_padding_is_no_object():
    vlm, _ = silenced("llava-clip-llama"), None

    class Padding:
        """Pads to a square with grey on the right, as LLaVA-1.5's own preprocessing does."""

        def __call__(self, images: list[Image.Image], **_: Any) -> dict[str, torch.Tensor]:
            array = np.full((16, 16, 3), 127, np.float32)
            array[:, :8] = np.asarray(images[0], np.float32)
            return {"pixel_values": torch.tensor(array / 127.5 - 1).permute(2, 0, 1)[None]}

    mask = np.full((16, 8), 1, np.uint8)
    _, coverage = patch_coverage(pictures_only(Padding()), vlm, mask, "")
    assert coverage.view(4, 4).tolist() == [[1.0, 1.0, 0.0, 0.0]] * 4


def test_masks_of_another_kind_are_an_error():
    vlm, case = silenced("llava-clip-llama"), SQUARE["llava-clip-llama"]
    with pytest.raises(ValueError, match=r"got shape \(4, 4, 3\), uint8"):
        patch_coverage(pictures_only(case.image_processor), vlm, np.zeros((4, 4, 3), np.uint8), "")
