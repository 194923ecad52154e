"""Fidelity against scikit-learn's Ridge and planted answers; CKA and neighbours against their definitions."""

from itertools import permutations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from keepsight.diagnosis.metrics.baselines import partners, place_score, split_images
from keepsight.diagnosis.metrics.ridge import TEST, TRAIN, UNUSED, VALIDATION, fit_ridge
from keepsight.diagnosis.metrics.similarity import Gram, agreement, debiased_cka, hsic
from keepsight.results.intervals import ratio_interval


def problem(images=60, each=20, noise=1.0, seed=0):
    """Features [n, 12] of which one is constant, targets [n, 7] with one constant; which image and part each is of."""
    generator = np.random.default_rng(seed)
    n = images * each
    x = generator.normal(3.0, 1.0, (n, 12)) * np.geomspace(0.1, 30, 12)
    x[:, 4] = 2.5
    y = (x / np.geomspace(0.1, 30, 12)) @ generator.normal(size=(12, 7)) + noise * generator.normal(size=(n, 7))
    y[:, 3] = -1.0
    image = np.repeat(np.arange(images), each)
    return x.astype(np.float32), y.astype(np.float32), image, split_images(images, 0)[image]


def blocks_of(x, size=100):
    def blocks():
        for start in range(0, len(x), size):
            rows = np.arange(start, min(start + size, len(x)))
            yield rows, torch.from_numpy(x[rows])

    return blocks


def read(y):
    return lambda rows: torch.from_numpy(y[rows])


def test_ridge_equals_scikit_learn():
    x, y, image, part = problem()
    strengths = (1e-4, 1e-1, 10.0)
    fit = fit_ridge(blocks_of(x), {"y": read(y)}, part, image, strengths=strengths)
    train = part == TRAIN
    live_x, live_y = np.arange(12) != 4, np.arange(7) != 3

    def standard(table, live):
        kept = table[:, live].astype(np.float64)
        return (kept - kept[train].mean(axis=0)) / kept[train].std(axis=0)

    z, t = standard(x, live_x), standard(y, live_y)
    models = [Ridge(alpha=a * train.sum(), fit_intercept=False).fit(z[train], t[train]) for a in strengths]
    validation = part == VALIDATION
    errors = [((model.predict(z[validation]) - t[validation]) ** 2).sum() for model in models]
    best = int(np.argmin(errors))
    score = fit.scores["y"]
    assert score.strength == strengths[best]
    test = part == TEST
    guess, truth = models[best].predict(z[test]), t[test]
    owner = image[test]
    expected = [((guess - truth) ** 2).sum(axis=1)[owner == i].sum() for i in np.unique(owner)]
    np.testing.assert_allclose(score.error, expected, rtol=1e-6)
    np.testing.assert_allclose(score.spread, [(truth[owner == i] ** 2).sum() for i in np.unique(owner)], rtol=1e-6)
    cosine = (guess * truth).sum(axis=1) / np.linalg.norm(guess, axis=1) / np.linalg.norm(truth, axis=1)
    np.testing.assert_allclose(score.cosine, [cosine[owner == i].mean() for i in np.unique(owner)], rtol=1e-6)
    assert (fit.constant, score.constant) == (1, 1)
    assert (fit.train, fit.test) == (train.sum(), test.sum())


def test_planted_share_is_found_and_chosen_strength_resists_noise():
    """Target = signal + noise of equal variance: R² is 0.5. Noise alone predicts nothing."""
    generator = np.random.default_rng(1)
    image = np.repeat(np.arange(400), 10)
    part = split_images(400, 0)[image]
    x = generator.normal(size=(4000, 6)).astype(np.float32)
    signal = x @ np.linalg.qr(generator.normal(size=(6, 6)))[0]
    y = (signal + generator.normal(size=signal.shape)).astype(np.float32)
    score = fit_ridge(blocks_of(x, 512), {"y": read(y)}, part, image).scores["y"]
    share = 1 - score.error.sum() / score.spread.sum()
    assert share == pytest.approx(0.5, abs=0.03)
    found = ratio_interval(score.error, score.spread)
    assert found.low < 0.5 < found.high
    assert found.high - found.low < 0.1
    assert score.cosine.mean() == pytest.approx(np.sqrt(0.5), abs=0.05)
    wide = generator.normal(size=(4000, 600)).astype(np.float32)
    noise = fit_ridge(blocks_of(wide, 512), {"y": read(y)}, part, image).scores["y"]
    assert noise.strength >= 10
    assert 1 - noise.error.sum() / noise.spread.sum() == pytest.approx(0.0, abs=0.01)


def test_unused_tokens_change_nothing():
    x, y, image, part = problem(images=10)
    spoiled, used = x.copy(), part.copy()
    spoiled[::7] = 1e6
    used[::7] = UNUSED
    kept = used != UNUSED
    one = fit_ridge(blocks_of(spoiled), {"y": read(y)}, used, image).scores["y"]
    other = fit_ridge(blocks_of(x[kept]), {"y": read(y[kept])}, part[kept], image[kept]).scores["y"]
    np.testing.assert_allclose(one.error, other.error, rtol=1e-9)
    with pytest.raises(ValueError, match="one of the parts is empty"):
        fit_ridge(blocks_of(x), {"y": read(y)}, np.zeros(len(x), int), image)


def test_place_alone_predicts_what_the_place_tells():
    """A target of place mean plus noise of the same variance: half of it follows from the place."""
    generator = np.random.default_rng(2)
    image, place = np.repeat(np.arange(300), 16), np.tile(np.arange(16), 300)
    means = generator.normal(size=(16, 40))
    y = (means[place] + generator.normal(size=(4800, 40))).astype(np.float32)
    part = split_images(300, 0)[image]
    score = place_score(read(y), part, place, image)
    assert 1 - score.error.sum() / score.spread.sum() == pytest.approx(0.5, abs=0.04)
    nothing = place_score(read(generator.normal(size=y.shape).astype(np.float32)), part, place, image)
    assert 1 - nothing.error.sum() / nothing.spread.sum() == pytest.approx(0.0, abs=0.005)
    assert nothing.strength == 1000.0


def test_partners_are_of_other_images_at_the_same_place():
    generator = np.random.default_rng(3)
    image, place = np.repeat(np.arange(30), 16), np.tile(np.arange(16), 30)
    kept = np.sort(generator.permutation(480)[:200])
    image, place = image[kept], place[kept]
    part = split_images(30, 1)[image]
    found = partners(part, place, image, 0)
    assert (part[found] == part).all()
    assert (image[found] != image).all()
    shared = np.array([((place == p) & (part == q)).sum() > 1 for p, q in zip(place, part, strict=True)])
    assert (place[found] == place)[shared].all()


def test_split_is_by_image_in_the_stated_shares():
    assert [int((split_images(50, 3) == one).sum()) for one in (TRAIN, VALIDATION, TEST)] == [30, 10, 10]
    assert [int((split_images(5, 3) == one).sum()) for one in (TRAIN, VALIDATION, TEST)] == [3, 1, 1]


def cka(x, y):
    return float(debiased_cka(Gram.of(x), Gram.of(y))[0])


def test_cka_is_zero_for_unrelated_and_one_for_rotated():
    torch.manual_seed(0)
    x = torch.randn(40, 300)
    assert cka(x, 3 * x @ torch.linalg.qr(torch.randn(300, 300))[0] + 5) == pytest.approx(1.0)
    found = [cka(torch.randn(40, 300), torch.randn(40, 200)) for _ in range(40)]
    assert np.mean(found) == pytest.approx(0.0, abs=4 * np.std(found) / np.sqrt(40))
    assert abs(np.mean(found)) < 0.02  # the biased one is above 0.8 at these widths


def test_hsic_is_the_mean_over_distinct_quadruples():
    """Song et al.: of K_ij (L_ij + L_qr − 2 L_iq); of all images, then without each group."""
    torch.manual_seed(1)
    group = np.array([0, 1, 1, 0, 2, 2])
    k, l = Gram.of(torch.randn(6, 3), group), Gram.of(torch.randn(6, 2), group)  # noqa: E741
    found = hsic(k, l).tolist()
    for value, left in zip(found, (None, 0, 1, 2), strict=True):
        kept = [i for i in range(6) if left is None or group[i] != left]
        terms = [
            k.products[i, j] * (l.products[i, j] + l.products[q, r] - 2 * l.products[i, q])
            for i, j, q, r in permutations(kept, 4)
        ]
        assert value == pytest.approx(float(torch.stack(terms).mean()), rel=1e-9)


def test_neighbours_agree_by_definition():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 8, generator=generator), torch.randn(50, 5, generator=generator)
    found = agreement(Gram.of(x).neighbours(4), Gram.of(y).neighbours(4))

    def nearest(table, i):
        centred = (table - table.mean(dim=0)).numpy()
        cosines = [
            -np.inf if j == i else centred[i] @ centred[j] / np.linalg.norm(centred[i]) / np.linalg.norm(centred[j])
            for j in range(50)
        ]
        return set(np.argsort(cosines)[-4:])

    assert found.tolist() == [len(nearest(x, i) & nearest(y, i)) / 4 for i in range(50)]
    assert agreement(Gram.of(x).neighbours(4), Gram.of(2 * x + 1).neighbours(4)).min() == 1.0
