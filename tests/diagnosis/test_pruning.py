"""The probe under pruning: from the kept tokens alone, and telling when what matters is dropped."""

import numpy as np
import pytest
import torch
from PIL import Image

from keepsight.diagnosis import diagnose
from keepsight.diagnosis.collect.batches import Loader
from keepsight.diagnosis.data.pictures import find_pictures
from keepsight.diagnosis.pruning import _pooled
from keepsight.vlm import Vlm, capture
from keepsight.vlm.chat import render_prompt, special_tokens
from keepsight.vlm.pruning import Pruning, pruned
from tests.diagnosis.world import picture, tiny_llava


@pytest.fixture(scope="module")
def parts():
    return tiny_llava()


def test_pooled_over_the_kept_tokens(parts):
    model, processor = parts
    vlm = Vlm(model)
    images = [picture(colour, seed)[0] for seed, colour in enumerate(("red", "green", "blue"))]
    prompt = render_prompt(processor, "what color ?")
    loader = Loader(vlm, processor, find_pictures(images).items, prompt, 2, 0, whole=True)
    pruning = Pruning(1, 0.5)
    with torch.no_grad():
        pooled = _pooled(vlm, loader, pruning, [2, vlm.depth], range(3))
        for row, image in enumerate(images):  # each alone
            batch = processor(images=[[image]], text=[prompt], return_tensors="pt", **special_tokens(processor, prompt))
            with pruned(vlm, pruning) as state, capture(vlm, [2, vlm.depth]) as seen:
                model(**batch)
            kept = ~state.hidden[state.visual]
            assert kept.sum() == len(kept) / 2
            for layer in (2, vlm.depth):
                torch.testing.assert_close(
                    pooled[layer][row], seen.states[layer][kept].mean(dim=0), atol=1e-5, rtol=1e-4
                )


def test_rows_and_their_shares(parts):
    model, processor = parts
    pairs = [(colour, picture(colour, 10 * i + j)[0]) for i, colour in enumerate(("red", "green")) for j in range(8)]
    options = {"labels": [name for name, _ in pairs], "metrics": ["probes"], "progress": False, "batch_size": 5}
    prunings = [Pruning(1, 1.0, "uniform"), Pruning(1, 0.25, "uniform")]
    result = diagnose(model, processor, [image for _, image in pairs], prunings=prunings, **options)
    plain = {row.layer: row for row in result.rows if row.metric == "probe_accuracy" and not row.variant}
    pruned_rows = [row for row in result.rows if row.metric == "probe_accuracy_pruned"]
    controls = [row for row in pruned_rows if row.variant.endswith(", shuffled labels")]
    rows = [row for row in pruned_rows if row not in controls]
    depth = Vlm(model).depth
    assert [(row.variant, row.layer) for row in rows] == [
        (f"uniform, {share} after layer 1", layer)
        for share in ("100%", "25%")
        for layer in (depth // 2, depth)
        if layer > 1
    ]
    for row in rows[: len(rows) // 2]:
        assert row.value == plain[row.layer].value, "all kept: the plain probe"
        assert row.n == plain[row.layer].n
    assert all(np.nanmean(result.per_image.of(row.key)) == pytest.approx(row.value) for row in pruned_rows)
    shuffled = {row.layer: row for row in result.rows if row.metric == "probe_accuracy" and row.variant}
    for row in controls[: len(controls) // 2]:
        assert row.value == shuffled[row.layer].value, "the same labels, shuffled the same way"
    lost = [row for row in result.rows if row.metric == "pruning_loss"]
    assert [(row.variant, row.layer) for row in lost] == [(row.variant, row.layer) for row in rows]
    for row, left in zip(lost, rows, strict=True):
        assert row.value == pytest.approx(plain[row.layer].value - left.value)
        pairs = result.per_image.of(plain[row.layer].key) - result.per_image.of(left.key)
        assert set(pairs[~np.isnan(pairs)]) <= {-1.0, 0.0, 1.0}
        np.testing.assert_array_equal(result.per_image.of(row.key), pairs)
    assert [row.value for row in lost[: len(lost) // 2]] == [0.0] * (len(lost) // 2)


def test_what_pruning_cost_needs_the_layer_without_it(parts):
    images = [picture(colour, seed)[0] for seed in range(6) for colour in ("red", "green")]
    options = {"labels": ["red", "green"] * 6, "metrics": ["probes"], "layers": [0, 1], "progress": False}
    result = diagnose(*parts, images, prunings=[Pruning(1, 0.5)], **options)
    lost = [row for row in result.rows if row.metric == "pruning_loss"]
    assert {row.note for row in lost} == {f"layer {row.layer} was not captured without pruning" for row in lost}
    assert all(row.value is None for row in lost)


def test_what_pruning_cost_needs_the_probes_without_it(parts):
    images = [picture(colour, seed)[0] for seed in range(6) for colour in ("red", "green")]
    options = {"labels": ["red", "green"] * 6, "metrics": ["maps"], "layers": ["middle"], "progress": False}
    result = diagnose(*parts, images, prunings=[Pruning(1, 0.5)], **options)
    lost = [row for row in result.rows if row.metric == "pruning_loss"]
    assert {(row.value, row.note) for row in lost} == {(None, "probes were not asked for")}


def test_shares_that_are_near_one_another_are_told_apart(parts, tmp_path):
    images = [picture(colour, seed)[0] for seed in range(6) for colour in ("red", "green")]
    prunings = [Pruning(1, keep, "uniform") for keep in (0.125, 0.12, 0.12)]
    options = {"labels": ["red", "green"] * 6, "metrics": ["probes"], "layers": ["middle"], "progress": False}
    result = diagnose(*parts, images, prunings=prunings, **options)
    variants = [row.variant for row in result.rows if row.metric == "pruning_loss"]
    assert list(dict.fromkeys(variants)) == ["uniform, 12.5% after layer 1", "uniform, 12% after layer 1"]
    assert len(variants) == 4  # at the middle and the last layer
    assert "12.5%" in result.report(tmp_path / "report.html").read_text(encoding="utf-8")


def test_settings_that_mean_nothing_are_refused_before_the_work(parts):
    model, processor = parts
    images = [Image.new("RGB", (16, 16))] * 4
    with pytest.raises(ValueError, match="keeps no visual token, so there is nothing to probe; give keep above 0"):
        diagnose(model, processor, images, prunings=[Pruning(1, 0.0)], progress=False)
    draws = [Pruning(1, 0.5, "random", seed) for seed in (0, 1)]
    with pytest.raises(ValueError, match="two prunings are called 'random, 50% after layer 1'"):
        diagnose(model, processor, images, prunings=draws, progress=False)
    with pytest.raises(ValueError, match="the last one: nothing comes after it"):
        diagnose(model, processor, images, prunings=[Pruning(Vlm(model).depth, 0.5)], progress=False)


def test_without_labels_no_forward_is_spent_and_a_row_says_why(parts, monkeypatch):
    monkeypatch.setattr("keepsight.diagnosis.pruning._pooled", None)  # would fail if it were called
    images = [picture("red", seed)[0] for seed in range(3)]
    result = diagnose(*parts, images, metrics=["maps"], prunings=[Pruning(1, 0.5)], progress=False)
    (row,) = [row for row in result.rows if row.metric == "probe_accuracy_pruned"]
    assert (row.value, row.note) == (None, "no labels were given")


def test_broken_pictures_that_leave_too_few_for_a_probe_are_no_error(parts, tmp_path):
    """Classes of three, two and two pictures, of which one of the three is broken: `probe_accuracy` says why."""
    labels = ["red"] * 3 + ["green"] * 2 + ["blue"] * 2
    paths = [tmp_path / f"{number}.png" for number in range(len(labels))]
    for number, (label, path) in enumerate(zip(labels, paths, strict=True)):
        picture(label, number)[0].save(path)
    paths[0].write_bytes(paths[0].read_bytes()[:50])
    options = {"metrics": ["probes"], "skip_broken": True, "progress": False}
    result = diagnose(*parts, paths, labels=labels, prunings=[Pruning(1, 0.5)], **options)
    assert [row.metric for row in result.rows if row.metric.startswith("probe")] == ["probe_accuracy"]
    (row,) = [row for row in result.rows if row.metric == "probe_accuracy"]
    assert row.note == "broken pictures leave fewer than two classes of two pictures, one of them of three"
