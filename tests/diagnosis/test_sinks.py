"""Probes, CKA and shared neighbours without sinks, on planted tokens: against the mean of the kept tokens."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from keepsight.diagnosis import summary
from keepsight.diagnosis.collect.accumulate import Accumulator
from keepsight.diagnosis.collect.batch import Batch
from keepsight.diagnosis.collect.calibrate import LayerCalibration
from keepsight.diagnosis.metrics.similarity import Similarity
from keepsight.diagnosis.probes.probe import L2_GRID, fit_probes, stratified_split
from keepsight.results import PerImageBuilder

IMAGES, CLASSES, TOKENS, WIDTH, BATCH = 150, 3, 16, 12, 7
LAYERS = (0, 2, 3, 5)
NONE, EACH, SOME, CHANNEL = LAYERS  # where the sinks are
CONSUMED = (3, 77)  # images that at one layer are sinks only
THRESHOLD = 60.0
LABELS = [f"class {i % CLASSES}" for i in range(IMAGES)]
NAMES = [f"{i}" for i in range(IMAGES)]


def planted_tokens() -> torch.Tensor:
    """[L, n, T, d]: classes a little apart; at EACH a token of every image a thousand times as long as the others."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    centres = 0.4 * random(CLASSES, WIDTH)[torch.arange(IMAGES) % CLASSES]
    tokens = random(len(LAYERS), IMAGES, TOKENS, WIDTH) + 0.6 * random(len(LAYERS), IMAGES, 1, WIDTH)
    tokens += centres[None, :, None]
    tokens[1, :, 4] = 1e4 * torch.nn.functional.normalize(random(IMAGES, WIDTH), dim=1)
    tokens[2, 40:60, [2, 9]] *= 300.0  # whole batches go without
    tokens[2, CONSUMED] *= 300.0
    tokens[3, :, :, 5] = 40.0 * random(IMAGES, 1).tanh()
    return tokens


@pytest.fixture(scope="module")
def tokens():
    return planted_tokens()


@pytest.fixture(scope="module")
def encoder():
    """[n, T, 5], which shares something with the images' means."""
    generator = torch.Generator().manual_seed(1)
    shared = planted_tokens()[0].mean(dim=1, keepdim=True) @ torch.randn(WIDTH, 5, generator=generator)
    return shared + torch.randn(IMAGES, TOKENS, 5, generator=generator)


@pytest.fixture(scope="module")
def accumulator(tokens, encoder, tmp_path_factory):
    plain = LayerCalibration(torch.zeros(WIDTH), torch.zeros(WIDTH), THRESHOLD, torch.ones(WIDTH), False)
    channels = torch.ones(WIDTH)
    channels[5] = 0.0
    calibration = dict.fromkeys(LAYERS, plain)
    calibration[CHANNEL] = replace(plain, channels=channels, has_sinks=True)
    found = Accumulator(LAYERS, WIDTH, calibration, tmp_path_factory.mktemp("rows"), bleeding=False)
    for start in range(0, IMAGES, BATCH):
        images = range(start, min(start + BATCH, IMAGES))
        found.begin(batch(len(images)))
        for position, layer in enumerate(LAYERS):
            found.sink(layer, tokens[position, images].flatten(0, 1))
        found.take_encoder(encoder[images].flatten(0, 1))
        found.append(found.end(images))
    return found


def batch(images: int) -> Batch:
    none = torch.zeros(0, dtype=torch.long)
    return Batch(
        image=torch.arange(images).repeat_interleave(TOKENS),
        n_images=images,
        thumbnail=torch.zeros(images * TOKENS, dtype=torch.bool),
        objects=torch.zeros(0, images * TOKENS, dtype=torch.bool),
        owner=none,
        sample=none,
        group=torch.zeros(images, dtype=torch.long),
        place=torch.arange(TOKENS).repeat(images),
        counted=torch.ones(images, dtype=torch.bool),
    )


@pytest.fixture(scope="module")
def kept_means(tokens):
    """[L, n, d] float64: the mean of the kept tokens by definition; of an image without any, that of the others."""
    x = tokens.double().numpy()
    kept = np.linalg.norm(x, axis=3) <= THRESHOLD
    means = np.full((len(LAYERS), IMAGES, WIDTH), np.nan)
    for layer, image in np.ndindex(len(LAYERS), IMAGES):
        if kept[layer, image].any():
            means[layer, image] = x[layer, image][kept[layer, image]].mean(axis=0)
    assert list(np.argwhere(np.isnan(means[:, :, 0]))[:, 1]) == list(CONSUMED)
    means = np.where(np.isnan(means), np.nanmean(means, axis=1, keepdims=True), means)
    means[3, :, 5] = 0.0
    return means


@pytest.fixture(scope="module")
def builder():
    return PerImageBuilder(NAMES)


@pytest.fixture(scope="module")
def probes(accumulator, builder):
    fitted = []

    def counted(read, layers, labels, **more):
        fitted.append(list(layers))
        return fit_probes(read, layers, labels, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summary, "fit_probes", counted)
        rows = summary.target_rows(accumulator, {"kind": LABELS}, range(IMAGES), EACH, builder, seed=4)
    assert fitted == [list(LAYERS), [EACH, SOME, CHANNEL]]  # what has no sinks is not fitted again
    return {row.key[0:1] + row.key[2:]: row for row in rows}


@pytest.fixture(scope="module")
def similarities(accumulator, builder):
    similarity = Similarity(accumulator, builder, 4)
    rows = [row for position in range(len(LAYERS)) for row in similarity.rows(position)]
    return {row.key[0:1] + row.key[2:]: row for row in rows}


def test_mean_of_the_kept_tokens_keeps_its_digits(accumulator, kept_means):
    """A sink ten thousand times as long as the mean: taken off a float32 sum, it would take four digits along."""
    for position, expected in enumerate(kept_means):
        found = accumulator.without_sinks(position, np.arange(IMAGES))
        scale = np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(found[:] / scale, expected / scale, atol=1e-6)
        some = np.array([149, 59, 3, 40, 0])  # from the disk in any order
        assert accumulator.without_sinks(position, some).shape == (5, WIDTH)
        np.testing.assert_array_equal(accumulator.without_sinks(position, some)[1:], found[some[1:]])
        said = "2 images are sinks only: the mean of the others stands for theirs" if position == 2 else ""
        assert accumulator.bare.note(position) == said
    assert [accumulator.bare.differ(position) for position in range(4)] == [False, True, True, True]
    assert sorted(file.name for file in accumulator.folder.glob("bare*")) == ["bare-1-0.f32", "bare-2-0.f32"]
    assert accumulator.folder.joinpath("bare-2-0.f32").stat().st_size == 4 * WIDTH * 22  # images that have some


def by_scikit_learn(x: np.ndarray) -> float:
    split, y = stratified_split(LABELS, 4), np.array(LABELS)
    z = StandardScaler().fit(x[split.train]).transform(x)
    best = (-1.0, 0.0)  # accuracy on validation, on test
    for l2 in L2_GRID:
        model = LogisticRegression(C=1 / (len(split.train) * l2), tol=1e-6, max_iter=5000)
        model.fit(z[split.train], y[split.train])
        validation, test = (model.score(z[part], y[part]) for part in (split.validation, split.test))
        best = (validation, test) if validation >= best[0] else best  # of equals, the strongest
    return best[1]


def test_probe_reads_what_the_sinks_hid(probes, kept_means):
    for position, layer in enumerate(LAYERS):
        row = probes["probe_accuracy", "", "without sinks", layer]
        assert row.value == pytest.approx(by_scikit_learn(kept_means[position]), abs=1.5 / 30)  # one tie apart
        assert (row.n, row.target) == (30, "kind")
    with_sinks, without = (probes["probe_accuracy", "", kind, EACH].value for kind in ("all", "without sinks"))
    assert with_sinks < 0.5 < 0.8 < without  # chance is a third
    assert probes["probe_accuracy", "", "without sinks", SOME].note.endswith("stands for theirs")
    assert "stands" not in probes["probe_accuracy", "", "all", SOME].note


def test_block_by_block_is_the_same(accumulator, probes, monkeypatch):
    monkeypatch.setattr("keepsight.diagnosis.probes.fit.FEATURES_MEMORY", 1)
    monkeypatch.setattr("keepsight.diagnosis.collect.mean_tokens.BLOCK", 16)
    monkeypatch.setattr("keepsight.diagnosis.probes.fit.BLOCK", 1 << 16)
    rows = summary.target_rows(accumulator, {"kind": LABELS}, range(IMAGES), EACH, PerImageBuilder(NAMES), seed=4)
    for row in rows:
        if row.metric == "probe_accuracy" and not row.variant:
            expected = probes["probe_accuracy", "", row.tokens, row.layer].value
            assert row.value == pytest.approx(expected, abs=1.5 / 30), row


def test_drop_is_between_two_accuracies_without_sinks(probes):
    chance = probes["probe_chance", "", "all", None].value
    for kind in ("all", "without sinks"):
        first, later = (probes["probe_accuracy", "", kind, layer].value for layer in (NONE, EACH))
        drop = probes["probe_drop", "", kind, EACH]
        assert drop.value == pytest.approx((first - later) / (first - chance))
        assert drop.low < drop.value < drop.high
    assert probes["probe_drop", "", "all", EACH].value > 0.5 > probes["probe_drop", "", "without sinks", EACH].value
    worst = {key[2]: key[3] for key in probes if key[0] == "probe_worst_layer"}
    assert set(worst) == {"all", "without sinks"}
    assert worst["all"] == EACH
    assert sum(key[0] == "probe_chance" for key in probes) == 1


def test_shuffled_labels_stay_at_chance_without_sinks(probes):
    found = [probes["probe_accuracy", "shuffled labels", "without sinks", layer].value for layer in LAYERS]
    assert np.mean(found) == pytest.approx(1 / 3, abs=0.15)  # 120 answers


def unbiased_hsic(x: np.ndarray, y: np.ndarray) -> float:
    """Song et al. 2012, equation 5, with whole matrices."""
    k, l = x @ x.T, y @ y.T  # noqa: E741
    for gram in (k, l):
        np.fill_diagonal(gram, 0.0)
    n = len(x)
    ends = k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ l).sum()
    return (np.trace(k @ l) + ends) / (n * (n - 3))


def nearest(x: np.ndarray, k: int) -> list[set[int]]:
    unit = (x - x.mean(axis=0)) / np.linalg.norm(x - x.mean(axis=0), axis=1, keepdims=True)
    cosine = unit @ unit.T - 9 * np.eye(len(x))
    return [set(order[-k:].tolist()) for order in np.argsort(cosine, axis=1)]


def test_cka_and_neighbours_equal_the_definitions_on_the_kept_tokens(similarities, kept_means, encoder):
    seen = encoder.double().mean(dim=1).numpy()
    for position, layer in enumerate(LAYERS):
        x = kept_means[position]
        expected = unbiased_hsic(x, seen) / np.sqrt(unbiased_hsic(x, x) * unbiased_hsic(seen, seen))
        row = similarities["cka", "", "without sinks", layer]
        assert row.value == pytest.approx(expected, abs=1e-5)
        assert row.low < row.value < row.high
        agreed = np.array([len(a & b) / 10 for a, b in zip(nearest(x, 10), nearest(seen, 10), strict=True)])
        kept = [i for i in range(IMAGES) if layer != SOME or i not in CONSUMED]  # whose cosines are 0 / 0
        row = similarities["neighbour_agreement", "", "without sinks", layer]
        assert row.value == pytest.approx(agreed.mean(), abs=1e-6 if len(kept) == IMAGES else 2 / IMAGES)
    assert similarities["cka", "", "all", EACH].value < 0.1 < similarities["cka", "", "without sinks", EACH].value
    assert similarities["cka", "", "without sinks", SOME].note.startswith("2 images are sinks only")
    assert similarities["neighbour_agreement", "", "without sinks", SOME].note.startswith("k = 10; 2 images are")


def test_without_sinks_both_rows_are_the_same(probes, similarities):
    told = {**probes, **similarities}
    compared = 0
    for key, row in told.items():
        if key[2] == "without sinks" and key[3] == NONE:
            assert replace(row, tokens="all") == told[*key[:2], "all", NONE]
            compared += 1
    assert compared == 6  # accuracy, CKA, neighbours, and their controls
    for layer in (EACH, SOME, CHANNEL):
        for metric in ("cka", "neighbour_agreement"):
            assert told[metric, "", "all", layer].value != told[metric, "", "without sinks", layer].value


def test_each_picture_adds_to_the_rows_without_sinks(probes, similarities, builder):
    """So that two runs are compared in pairs there, too."""
    kept = builder.finish()
    for row in (*probes.values(), *similarities.values()):
        if row.tokens == "without sinks" and row.metric != "cka" and row.variant != "permuted images":
            values = kept.of(row.key)
            assert np.nanmean(values) == pytest.approx(row.value, abs=1e-6), row
            assert np.isfinite(values).sum() == row.n
