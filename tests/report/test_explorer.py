"""What the explorer is given: maps that unpack to themselves, where patches lie, whose they are, and how much fits."""

import base64
import dataclasses
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from keepsight.report import build
from keepsight.report.curves import open_runs
from keepsight.report.explorer import BUDGET, Packed, cells, gather, pack
from keepsight.report.metrics import SECTIONS
from keepsight.report.panels import OPEN, draw_section
from keepsight.report.tables import summary
from keepsight.results import Example, LoadedRun, Measurement, SimilarityMap
from keepsight.results.maps import compress
from tests.report.browser import chromium
from tests.report.sample import sample_run


def unpack(packed: Packed) -> dict[str, np.ndarray]:
    """As explorer.js does it."""
    data, info, start = zlib.decompress(base64.b64decode(packed.data)), packed.info, 0
    n, layers, components = info["n"], len(info["layers"]), info["components"]
    found = {}
    for name, kind, shape in (
        ("boxes", "<f4", (n, 4)),
        ("top", "<i4", (layers if info["spoken"] else 0, n)),
        ("row", "<i2", (n,)),
        ("column", "<i2", (n,)),
        ("codes", "i1", (layers, components, n)),
        ("object", "u1", (n,)),
        ("whole", "u1", (n,)),
    ):
        count = int(np.prod(shape))
        found[name] = np.frombuffer(data, kind, count, start).reshape(shape)
        start += found[name].nbytes
    assert start == len(data)
    return found


def grid_map(rows: int, columns: int, layers: int = 2, seed: int = 0) -> SimilarityMap:
    rng = np.random.default_rng(seed)
    n = rows * columns
    codes, error, worst = zip(*[compress(rng.normal(size=(n, 40))) for _ in range(layers)], strict=True)
    row, column = np.divmod(np.arange(n), columns)
    return SimilarityMap(
        layers=np.arange(layers, dtype=np.int16),
        codes=np.stack(codes),
        error=np.array(error, np.float32),
        worst=np.array(worst, np.float32),
        centres=np.column_stack([(column + 0.5) / columns, (row + 0.5) / rows]).astype(np.float32),
        tile=np.zeros(n, np.int16),
        row=row.astype(np.int16),
        column=column.astype(np.int16),
    )


def test_cosines_and_words_unpack_to_the_maps_own() -> None:
    found = sample_run(0).examples[0].map
    assert found is not None
    words = {"of another map": 0}
    packed = pack(found, None, words)
    back, table = unpack(packed), list(words)
    for position, layer in enumerate(found.layers):
        codes = back["codes"][position].astype(float)  # [K, N]
        again = (codes.T @ codes / 127**2).clip(-1, 1)
        for token in (0, 19, 63):
            expected = found.similarity(int(layer), token)
            kept = np.arange(64) != token
            np.testing.assert_allclose(again[token][kept], expected[kept], atol=1e-6)
            assert table[back["top"][position, token]] == found.word(int(layer), token)
    assert packed.info["error"] == [round(float(error), 4) for error in found.error]
    assert not packed.info["tiled"]
    assert not pack(grid_map(2, 3), None, words).info["spoken"]


def test_patches_fill_the_picture() -> None:
    boxes = cells(grid_map(2, 4))
    assert boxes[0].tolist() == pytest.approx([0, 0, 0.25, 0.5])
    assert boxes[7].tolist() == pytest.approx([0.75, 0.5, 0.25, 0.5])
    assert boxes[:, 2:].prod(axis=1).sum() == pytest.approx(1)
    assert cells(grid_map(1, 4))[1].tolist() == pytest.approx([0.25, 0, 0.25, 1])  # one row: as high as the picture


def test_padding_has_no_place_and_tiles_have_sizes_of_their_own() -> None:
    found = grid_map(2, 4)
    found.centres[3] = np.nan
    boxes = cells(found)
    assert np.isnan(boxes[3]).all()
    assert boxes[2].tolist() == pytest.approx([0.5, 0, 0.25, 0.5])
    both = dataclasses.replace(
        found,
        centres=np.concatenate([grid_map(1, 2).centres, grid_map(2, 3).centres]),
        tile=np.array([0] * 2 + [1] * 6, np.int16),
        row=np.array([0, 0, 0, 0, 0, 1, 1, 1], np.int16),
        column=np.array([0, 1, 0, 1, 2, 0, 1, 2], np.int16),
        thumbnail=np.array([True] * 2 + [False] * 6),
    )
    boxes = cells(both)
    assert boxes[0, 2:].tolist() == pytest.approx([0.5, 1.0])
    assert boxes[7].tolist() == pytest.approx([2 / 3, 0.5, 1 / 3, 0.5])
    packed = pack(both, None, {})
    assert packed.info["tiled"]
    assert unpack(packed)["whole"].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


def test_a_patch_belongs_to_the_object_that_covers_half_of_it() -> None:
    mask = np.zeros((4, 8), dtype=np.uint8)  # patches of 2 × 2 pixels
    mask[0:2, 0:2] = 9  # all of patch 0
    mask[0, 2:4] = 9  # half of patch 1
    mask[0, 4] = 9  # a quarter of patch 2
    mask[2:4, 0] = 4  # half of patch 4
    mask[2:4, 6:8] = 255  # ignored: patch 7
    owner = unpack(pack(grid_map(2, 4), mask, {}))["object"]
    assert owner.tolist() == [2, 2, 0, 0, 1, 0, 0, 0]  # object 4 is the first, 9 the second


def test_runs_share_a_picture_and_pictures_past_the_budget_go_without_maps() -> None:
    runs = open_runs([sample_run(0), sample_run(1)])
    shown, words = gather(runs)
    assert len(shown) == 6
    assert sorted(words) == sorted([" the", " grey", "red", " square", " circle"])
    assert all(sorted(item.maps) == [0, 1] for item in shown)
    assert shown[0].maps[0].data != shown[0].maps[1].data
    first = sum(len(each.data) for each in shown[0].maps.values())
    assert [bool(item.maps) for item in gather(runs, int(first * 2.5))[0]] == [True, True, False, False, False, False]


def test_many_label_sets_are_folded_away() -> None:
    rows = [Measurement("probe_accuracy", 0.5, layer=layer, target=f"t{i}") for i in range(40) for layer in (0, 1)]
    section = SECTIONS[0]
    figures = draw_section(open_runs([LoadedRun("a", rows)]), section)
    assert figures is not None
    assert [len(group.panels) for group in figures.groups] == [OPEN]
    (more,) = figures.more
    assert len(more.panels) == 40 - OPEN
    assert [panel.title for panel in more.panels[:2]] == [f"t{OPEN}", f"t{OPEN + 1}"]


def test_sizes_and_classes_of_objects_are_folded_and_not_in_the_table() -> None:
    structure = next(section for section in SECTIONS if section.id == "structure")
    rows = [
        Measurement(name, 0.5, layer=layer, variant="raw", target=target)
        for name in ("gap", "cohesion")
        for target in ("", "objects: small", *(f"objects: class {i}" for i in range(20)))
        for layer in (0, 1)
    ]
    runs = open_runs([LoadedRun("a", rows)])
    figures = draw_section(runs, structure)
    assert figures is not None
    assert [panel.title for group in figures.groups for panel in group.panels] == ["Gap"]
    assert [(group.title, len(group.panels)) for group in figures.more] == [
        ("Cohesion, coupling, and their ratio", 1),
        ("By size and class of the objects", 21),
    ]
    assert figures.more[1].panels[0].title == "Gap, objects: small"
    assert {line.title for line in summary(runs)} == {"Gap, raw", "Cohesion, raw"}


def test_a_section_of_supporting_figures_alone_is_open() -> None:
    structure = next(section for section in SECTIONS if section.id == "structure")
    rows = [Measurement("coupling", 0.5, layer=layer, variant="raw") for layer in (0, 1)]
    figures = draw_section(open_runs([LoadedRun("a", rows)]), structure)
    assert figures is not None
    assert [panel.title for panel in figures.groups[0].panels] == ["Coupling"]
    assert figures.more == []


def test_without_a_browser_its_tests_are_skipped_unless_it_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("KEEPSIGHT_BROWSER", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no Chromium is installed"), chromium():
        pass
    monkeypatch.setenv("KEEPSIGHT_BROWSER", "required")
    with pytest.raises(pytest.fail.Exception, match="the report's browser tests did not run"), chromium():
        pass


@pytest.mark.slow
def test_thirty_pictures_of_33_layers_stay_under_25_megabytes(tmp_path: Path) -> None:
    """576 patches, the spectrum of noise (which packs worst), a vocabulary of 4,000, photographs with texture."""
    rng = np.random.default_rng(0)
    grid, depth, pictures = 24, 32, 30
    some = [compress(rng.normal(size=(grid * grid, 64)))[0] for _ in range(4)]
    words = np.array([f"word{i:04d}" for i in range(4000)])
    examples = []
    for number in range(pictures):
        # Another order of the patches in each layer: nothing repeats that packing could use.
        codes = np.stack([some[layer % 4][rng.permutation(grid * grid)] for layer in range(depth + 1)])
        found = dataclasses.replace(
            grid_map(grid, grid, layers=1, seed=number),
            layers=np.arange(depth + 1, dtype=np.int16),
            codes=codes,
            error=np.full(depth + 1, 0.01, np.float32),
            worst=np.full(depth + 1, 0.1, np.float32),
            words=words,
            top=(4000 * rng.random((depth + 1, grid * grid)) ** 4).astype(np.int32),
        )
        noise = Image.fromarray(rng.integers(0, 256, (448, 448, 3), dtype=np.uint8))
        image = noise.filter(ImageFilter.GaussianBlur(2))
        mask = np.repeat(np.repeat(rng.integers(0, 6, (14, 14), dtype=np.uint8), 32, axis=0), 32, axis=1)
        examples.append(Example(image, mask, f"{number}.jpg", "a caption", found))
    run = dataclasses.replace(sample_run(0), examples=examples)
    out = build([run], tmp_path / "report.html")
    size = out.stat().st_size
    print(f"{size / 1e6:.1f} MB")
    assert size < 25_000_000
    maps = re.findall(r'id="map-\d+-0">([^<]+)<', out.read_text(encoding="utf-8"))
    assert len(maps) == pictures
    assert size - sum(map(len, maps)) + BUDGET < 25_000_000  # nor do maps of several runs lead beyond
