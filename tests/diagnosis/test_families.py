"""`diagnose` end to end on every family, with its real processor: against each picture alone through the plain model.

What is expected comes from other means than the code under test: transformers tokenizes the conversation, visual tokens
are found by the placeholder's id, states by `output_hidden_states`, the place of a token in its picture by the boxes
written down below, similarities by the whole N × N matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from keepsight.diagnosis import DEFAULT_PROMPT, Diagnosis, diagnose
from keepsight.diagnosis.metrics.similarity import Similarity
from keepsight.diagnosis.probes.probe import fit_probes
from keepsight.vlm import Vlm
from keepsight.vlm.chat import render_prompt
from keepsight.vlm.features import ProjectorInput
from tests import tiny, tiny_processors
from tests.diagnosis.metrics.test_bleeding import naive as naive_bleeding
from tests.diagnosis.world import states_alone
from tests.families import idefics2, llava_next

Box = tuple[int, int, int, int]  # left, top, right, bottom
SCOPES = ("all", "tiles", "thumbnail")


def grid(left: int, top: int, right: int, bottom: int, columns: int, rows: int) -> list[Box]:
    """The boxes of a grid, row by row."""
    x, y = np.linspace(left, right, columns + 1).astype(int), np.linspace(top, bottom, rows + 1).astype(int)
    return [(x[c], y[r], x[c + 1], y[r + 1]) for r in range(rows) for c in range(columns)]


def whole(side: int) -> Callable[[int, int], tuple[list[Box], list[Box]]]:
    """The picture is squeezed into one square of side × side tokens."""
    return lambda width, height: (grid(0, 0, width, height, side, side), [])


def tiled(width: int, height: int) -> tuple[list[Box], list[Box]]:
    """Tiles of 16 × 16 pixels in 2 × 2 tokens; where there are several, the whole in 2 × 2 tokens comes last."""
    tiles = grid(0, 0, width, height, width // 16, height // 16)
    boxes = [box for tile in tiles for box in grid(*tile, 2, 2)]
    return boxes, grid(0, 0, width, height, 2, 2) if len(tiles) > 1 else []


def mosaic(width: int, height: int) -> tuple[list[Box], list[Box]]:
    """The picture in 4 × 4 pixels a token, whatever its tiles; the whole in 4 × 4 tokens comes first."""
    return grid(0, 0, width, height, width // 4, height // 4), grid(0, 0, width, height, 4, 4)


@dataclass(frozen=True)
class Family:
    """A tiny model and its processor.

    boxes: of a picture of this width and height, which part each token shows: of the tiles, and of the thumbnail;
    sizes: of the pictures; unequal: whether they have different numbers of tokens; whole_first: the thumbnail's place.
    """

    model: Callable[[], Any]
    processor: Callable[[], Any]
    boxes: Callable[[int, int], tuple[list[Box], list[Box]]]
    sizes: tuple[tuple[int, int], ...]
    unequal: bool = True
    whole_first: bool = False

    def laid_out(self, width: int, height: int) -> list[tuple[Box, bool]]:
        """In the order of the tokens, the boxes and whether they are of the thumbnail."""
        tiles, thumbnail = ([(box, whole) for box in part] for whole, part in enumerate(self.boxes(width, height)))
        return thumbnail + tiles if self.whole_first else tiles + thumbnail


FAMILIES = {
    "llava-siglip-qwen2": Family(
        lambda: tiny.llava_siglip_qwen2()[0],
        tiny_processors.make_llava_siglip,
        whole(4),
        ((16, 16), (32, 16)),
        unequal=False,
    ),
    "qwen2.5-vl": Family(
        lambda: tiny.qwen2_5_vl()[0],
        tiny_processors.make_qwen,
        lambda width, height: (grid(0, 0, width, height, width // 8, height // 8), []),
        ((32, 32), (32, 16), (16, 32)),
    ),
    "internvl": Family(
        lambda: tiny.internvl()[0],
        tiny_processors.make_internvl,
        tiled,
        ((32, 32), (16, 16), (32, 16), (16, 32)),
    ),
    "llava-next": Family(
        lambda: llava_next()[0],
        lambda: tiny_processors.make_llava_next(patch=4),
        mosaic,
        ((32, 32), (32, 8), (16, 32)),  # the second is padded to 32 × 16
        whole_first=True,
    ),
    "smolvlm": Family(lambda: tiny.smolvlm()[0], tiny_processors.make_smolvlm, tiled, ((32, 32), (32, 16), (16, 32))),
    "gemma3": Family(
        lambda: tiny.gemma(patch=2, tokens=16),
        lambda: tiny_processors.make_gemma(tokens=16),
        whole(4),
        ((16, 16), (16, 32)),
        unequal=False,
    ),
}


def picture(index: int, width: int, height: int) -> tuple[Image.Image, np.ndarray]:
    """Noise on quarters of different colours. Value 4 of the mask is two of them that do not touch, 9 is a third."""
    mask = np.zeros((height, width), np.uint8)
    mask[: height // 2, : width // 2] = 4
    mask[height // 2 :, width // 2 + 1 :] = 4
    mask[: height // 2, width // 2 :] = 9
    generator = np.random.default_rng(index)
    colours = generator.integers(40, 215, (10, 3))
    pixels = colours[mask] + generator.normal(0, 30, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask


@dataclass
class Case:
    """A diagnosis, what the model was given meanwhile, and the same pictures one by one."""

    family: Family
    result: Diagnosis
    inputs: list[dict[str, torch.Tensor]]
    pooled: dict[int, np.ndarray]  # layer → [n, d], as the probes read them
    encoder: np.ndarray  # [n, d_v], the vision encoder's output, averaged over each picture's tokens
    states: list[torch.Tensor]  # of each picture [L + 1, N, d]
    pictures: list[tuple[Image.Image, np.ndarray]]


def diagnosed(name: str, side: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Case:
    family = FAMILIES[name]
    model, processor = family.model(), family.processor()
    processor.tokenizer.padding_side = side
    processor.tokenizer.init_kwargs["padding_side"] = side  # goes before a processor's own preference
    pictures = [picture(i, *family.sizes[i % len(family.sizes)]) for i in range(9)]
    pooled: dict[int, np.ndarray] = {}
    inputs: list[dict[str, torch.Tensor]] = []

    def fit(read: Any, layers: Any, names: Any, **more: Any) -> Any:
        pooled.update({layer: np.array(read(layer)[:]) for layer in layers})
        return fit_probes(read, layers, names, **more)

    monkeypatch.setattr("keepsight.diagnosis.summary.fit_probes", fit)
    encoder: list[np.ndarray] = []

    class Spy(Similarity):
        def __init__(self, accumulator: Any, *rest: Any) -> None:
            if accumulator.encoder_pooled is not None:
                encoder.append(accumulator.encoder_pooled.read(0))
            super().__init__(accumulator, *rest)

    monkeypatch.setattr("keepsight.diagnosis.rows.Similarity", Spy)
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(kwargs) if "input_ids" in kwargs else None, with_kwargs=True
    )
    result = diagnose(
        model,
        processor,
        [image for image, _ in pictures],
        labels=["a", "b", "c"] * 3,
        masks=[mask for _, mask in pictures],
        batch_size=4,
        calibration_images=9,
        progress=False,
        metrics="all",
        **options,
    )
    hook.remove()
    states = [states_alone(model, processor, image) for image, _ in pictures]
    return Case(family, result, inputs, pooled, encoder[0], states, pictures)


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module", params=["right", pytest.param("left", marks=pytest.mark.slow)])
def side(request: pytest.FixtureRequest) -> str:
    return request.param


QUICK = ("llava-siglip-qwen2", "internvl")
EACH = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


@pytest.fixture(scope="module", params=EACH)
def case(request: pytest.FixtureRequest, side: str, patch: pytest.MonkeyPatch) -> Case:
    return diagnosed(request.param, side, patch)


def scopes_of(family: Family, image: Image.Image, states: torch.Tensor) -> dict[str, torch.Tensor]:
    """Which tokens [N] each scope takes; tiles and thumbnail only of pictures that have both."""
    is_thumbnail = torch.tensor([bool(whole) for _, whole in family.laid_out(*image.size)])
    assert states.shape[1] == len(is_thumbnail)
    apart = is_thumbnail.any()
    return {"all": torch.ones_like(is_thumbnail), "tiles": ~is_thumbnail & apart, "thumbnail": is_thumbnail}


def members(family: Family, image: Image.Image, mask: np.ndarray, split: bool) -> torch.Tensor:
    """[K, N]: the tokens of which an object fills half of the box."""
    objects = []
    for value in np.unique(mask[mask > 0]):
        labels, parts = ndimage.label(mask == value, np.ones((3, 3))) if split else (mask == value, 1)
        objects += [labels == part for part in range(1, parts + 1)]
    boxes = [box for box, _ in family.laid_out(*image.size)]
    rows = [[area[t:b, left:r].mean() >= 0.5 for left, t, r, b in boxes] for area in objects]
    return torch.tensor(np.array(rows))


def by_pairs(tokens: torch.Tensor, objects: torch.Tensor) -> dict[str, float]:
    """Homogeneity of an image, cohesion and coupling of its objects, from all pairs; NaN where there is none."""
    unit = torch.nn.functional.normalize(tokens.double(), dim=1)
    cosine = unit @ unit.T
    apart = ~torch.eye(len(tokens), dtype=torch.bool)
    usable = [inside for inside in objects if inside.sum() >= 2 and (~inside).sum() >= 1]
    cohesion = [cosine[inside][:, inside][apart[inside][:, inside]].mean() for inside in usable]
    coupling = [cosine[inside][:, ~inside].mean() for inside in usable]
    return {
        "token_homogeneity": float(cosine[apart].mean()) if len(tokens) > 1 else np.nan,
        "cohesion": float(np.mean(cohesion)) if usable else np.nan,
        "coupling": float(np.mean(coupling)) if usable else np.nan,
    }


def compare(case: Case, split: bool = False) -> None:
    """Every layer, scope and variant of the patch structure against the pairwise definition."""
    rows = {(r.metric, r.variant, r.layer, r.tokens): r for r in case.result.rows if not r.target}
    scopes = [
        scopes_of(case.family, image, states) for (image, _), states in zip(case.pictures, case.states, strict=True)
    ]
    objects = [members(case.family, *drawn, split) for drawn in case.pictures]
    compared = 0
    for layer in range(5):
        mean = torch.cat([states[layer] for states in case.states]).mean(dim=0)
        for variant, centre in (("raw", 0.0), ("centred", mean)):
            for scope in SCOPES:
                found = [
                    by_pairs((states[layer] - centre)[kept[scope]], inside[:, kept[scope]])
                    for states, kept, inside in zip(case.states, scopes, objects, strict=True)
                ]
                for metric in ("token_homogeneity", "cohesion", "coupling"):
                    expected = np.array([one[metric] for one in found])
                    expected = expected[~np.isnan(expected)]
                    key = (metric, variant, layer, scope)
                    assert (key in rows) == bool(len(expected)), key
                    if key in rows:
                        assert rows[key].n == len(expected), key
                        assert rows[key].value == pytest.approx(expected.mean(), abs=2e-5), key
                        compared += 1
    assert compared >= 5 * 2 * 3


def test_states_and_prompt_of_a_batch_are_those_of_each_picture_alone(case: Case, side: str) -> None:
    padded_left = any(bool((inputs["attention_mask"][:, 0] == 0).any()) for inputs in case.inputs)
    assert padded_left == (side == "left" and case.family.unequal)
    for inputs in case.inputs:
        assert (inputs["input_ids"] == 1).sum(dim=1).eq(1).all(), "one <bos>, as transformers writes it"
    assert set(case.pooled) == set(range(5))
    for layer, pooled in case.pooled.items():
        expected = torch.stack([states[layer].mean(dim=0) for states in case.states])
        torch.testing.assert_close(torch.from_numpy(pooled), expected, atol=2e-5, rtol=1e-4)


def test_encoder_output_of_a_batch_is_that_of_each_picture_alone(case: Case) -> None:
    model, processor = case.family.model(), case.family.processor()
    vlm = Vlm(model)
    given = ProjectorInput(vlm)
    expected = []
    for image, _ in case.pictures:
        prompt = render_prompt(processor, DEFAULT_PROMPT)
        batch = dict(processor(images=[[image]], text=[prompt], return_tensors="pt"))
        with torch.no_grad():
            model(**batch)
        expected.append(given.on_tokens(vlm.image_tokens(batch), batch).mean(dim=0))
    torch.testing.assert_close(torch.from_numpy(case.encoder), torch.stack(expected), atol=2e-5, rtol=1e-4)
    layers = {(r.metric, r.layer) for r in case.result.rows if r.value is not None and r.variant == ""}
    assert {(name, layer) for name in ("fidelity", "fidelity_input") for layer in range(5)} <= layers


def test_similarity_maps(case: Case) -> None:
    shown = {example.name: example for example in case.result.examples}
    assert len(shown) == 6
    for index, (image, _) in enumerate(case.pictures):
        if f"picture {index}" not in shown:
            continue
        found = shown[f"picture {index}"].map
        assert found is not None
        for layer in range(5):
            unit = torch.nn.functional.normalize(case.states[index][layer], dim=1)
            expected = (unit @ unit.T).numpy()
            again = np.stack([found.similarity(layer, token) for token in range(len(expected))])
            assert np.abs(again - expected).max() <= found.worst[layer] + 1e-4
            assert found.error[layer] < 0.1
        boxes = np.array([box for box, _ in case.family.laid_out(*image.size)])
        middles = (boxes[:, :2] + boxes[:, 2:]) / 2 / np.array(image.size)
        np.testing.assert_allclose(found.centres, middles, atol=0.06)


def test_norms(case: Case) -> None:
    found = {r.layer: r.value for r in case.result.rows if (r.metric, r.tokens) == ("token_norm", "all")}
    for layer in range(5):
        expected = np.mean([float(states[layer].norm(dim=1).mean()) for states in case.states])
        assert found[layer] == pytest.approx(expected, rel=1e-5)


def test_structure_equals_the_pairwise_definition(case: Case) -> None:
    assert {r.value for r in case.result.rows if r.metric == "sink_tokens"} == {0.0}
    compare(case)


@pytest.mark.slow
def test_bleeding_equals_the_definition(case: Case) -> None:
    rows = {(r.layer, r.tokens): r for r in case.result.rows if (r.metric, r.variant) == ("bleeding", "raw")}
    for scope in SCOPES:
        per_image = []
        for (image, mask), states in zip(case.pictures, case.states, strict=True):
            kept = scopes_of(case.family, image, states)[scope]
            inside = members(case.family, image, mask, split=False)[:, kept]
            found = np.array(naive_bleeding(states[2][kept], inside)) if kept.any() else np.array([])
            per_image += [found[~np.isnan(found)].mean()] if (~np.isnan(found)).any() else []
        assert ((2, scope) in rows) == bool(per_image)
        if per_image:
            assert rows[2, scope].value == pytest.approx(np.mean(per_image), abs=1e-5)
            assert rows[2, scope].n == len(per_image)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.slow
def test_parts_of_a_mask_as_objects_of_their_own(name: str, patch: pytest.MonkeyPatch) -> None:
    together, apart = (diagnosed(name, "left", patch, split_components=split) for split in (False, True))
    compare(apart, split=True)
    counts = [case.result.info["counts"] for case in (together, apart)]
    assert [count["objects"] + count["skipped objects"] for count in counts] == [2 * 9, 3 * 9]


@pytest.mark.parametrize("batch_size", [1, 9])
def test_tiles_and_thumbnail_do_not_depend_on_the_batch(batch_size: int) -> None:
    """Pictures in one piece have neither, whatever they share a batch with."""
    family = FAMILIES["internvl"]
    drawn = [picture(i, *family.sizes[i % 4])[0] for i in range(9)]
    result = diagnose(family.model(), family.processor(), drawn, batch_size=batch_size, layers=[2], progress=False)
    counted = {r.tokens: r.n for r in result.rows if (r.metric, r.variant) == ("token_homogeneity", "raw")}
    assert counted == {"all": 9, "without sinks": 9, "tiles": 7, "thumbnail": 7}


def test_crops_that_are_pictures_of_their_own_are_named() -> None:
    processor = tiny_processors.make_gemma()

    class PanAndScan(type(processor)):
        def __call__(self, **inputs: Any) -> Any:
            return super().__call__(**inputs, do_pan_and_scan=True, pan_and_scan_min_crop_size=8)

    processor.__class__ = PanAndScan
    drawn = [picture(i, 32, 16)[0] for i in range(2)]
    with pytest.raises(ValueError, match=r"made 6 pictures of 2; the prompt .* set do_pan_and_scan=False \(Gemma 3\)"):
        diagnose(tiny.gemma(), processor, drawn, progress=False)


def test_a_resamplers_queries_are_diagnosed_without_masks() -> None:
    model, processor = idefics2()[0], tiny_processors.make_idefics2()
    drawn = [picture(i, 16, 16) for i in range(9)]
    images = [image for image, _ in drawn]
    result = diagnose(model, processor, images, labels=["a", "b", "c"] * 3, batch_size=4, progress=False)
    expected = np.mean([float(states_alone(model, processor, image)[2].norm(dim=1).mean()) for image in images])
    (found,) = (r.value for r in result.rows if (r.metric, r.layer, r.tokens) == ("token_norm", 2, "all"))
    assert found == pytest.approx(expected, rel=1e-5)
    assert {"probe_accuracy", "entropy_rank"} <= {r.metric for r in result.rows}
    (none,) = (r for r in result.rows if r.metric == "fidelity")
    assert none.value is None
    assert "its projector holds a resampler" in none.note
    assert {r.layer for r in result.rows if r.metric == "fidelity_input" and r.value is not None} == set(range(5))
    with pytest.raises(ValueError, match=r"'idefics2': its visual tokens come out of a resampler .* Leave masks out"):
        diagnose(model, processor, images, masks=[mask for _, mask in drawn], progress=False)
    splitting = tiny_processors.make_idefics2(do_image_splitting=True)
    with pytest.raises(ValueError, match=r"made 40 pictures of 8; .* or do_image_splitting=False \(Idefics2\)"):
        diagnose(model, splitting, images, batch_size=9, progress=False)
