"""Probes against scikit-learn, planted layers and the shuffled-label control."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from keepsight.diagnosis.probes.fit import standardise
from keepsight.diagnosis.probes.logistic import objective, solve, solve_streamed
from keepsight.diagnosis.probes.probe import (
    L2_GRID,
    Probe,
    drop_with_interval,
    fit_probes,
    probe_rows,
    stratified_split,
    wilson,
)
from tests.elsewhere import DEVICE, Accelerator

GRID = (1e-4, 1e-2, 1.0)


def features(layers: int, n: int, d: int, classes: int, signal: float, seed: int = 0):
    """Badly conditioned features, the classes apart by `signal`: [P, n, d], labels [n]."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centres = signal * torch.randn(layers, classes, d, generator=generator)
    mixing = torch.randn(layers, d, d, generator=generator) * torch.logspace(0, -2, d)[:, None]
    return (torch.randn(layers, n, d, generator=generator) + centres[:, y]) @ mixing + 3.0, y


def optimum(z: torch.Tensor, y: torch.Tensor, strength: float) -> tuple[LogisticRegression, float]:
    """scikit-learn's solution for z [n, d], and the objective there."""
    fit = LogisticRegression(C=1 / (len(z) * strength), tol=1e-7, max_iter=5000).fit(z.double().numpy(), y)
    weights, intercept = torch.tensor(fit.coef_)[None, None], torch.tensor(fit.intercept_)[None, None]
    return fit, objective(z[None], y[None], strength, weights, intercept).item()


@pytest.mark.parametrize("grid", [GRID, L2_GRID, (3e-2,)], ids=["far apart", "default", "one"])
@pytest.mark.parametrize(("n", "d", "signal"), [(240, 30, 0.1), (90, 120, 0.3), (60, 400, 0.02)])
def test_equals_scikit_learn_in_objective_and_predictions(n, d, signal, grid):
    x, y = features(2, 2 * n, d, 4, signal)
    z = standardise(x, np.arange(n))
    targets = torch.stack([y, y.roll(1)])
    path, exact = (
        list(solve(z[:, :n], targets[:, :n], torch.tensor(grid), 4, tolerance=tolerance)) for tolerance in (3e-5, 1e-7)
    )
    assert [found.strength for found in path] == pytest.approx(sorted(grid, reverse=True))
    for found, near in zip(path, exact, strict=True):
        ours = objective(z[:, :n], targets[:, :n], found.strength, found.weights, found.intercept)
        torch.testing.assert_close(ours, found.objective, rtol=1e-4, atol=1e-7)
        for p in range(2):
            scaler = StandardScaler().fit(x[p, :n].double())
            np.testing.assert_allclose(z[p], scaler.transform(x[p].double()), atol=1e-4)
            for t, target in enumerate(targets):
                oracle, best = optimum(z[p, :n], target[:n], found.strength)
                assert ours[p, t].item() == pytest.approx(best, rel=1e-3)
                guess = (z[p, n:] @ near.weights[p, t].T + near.intercept[p, t]).argmax(dim=1).numpy()
                accuracy = (guess == target[n:].numpy()).mean()
                expected = oracle.score(z[p, n:].double().numpy(), target[n:])
                assert accuracy == pytest.approx(expected, abs=2.5 / n)  # the odd tie may fall the other way


def test_two_classes_are_scikit_learns_at_half_the_strength():
    """There one vector w of weights, here ±w/2, whose penalty is half of its."""
    x, y = features(1, 120, 20, 2, 0.05)
    z = standardise(x, np.arange(120))
    for found in solve(z, y[None], torch.tensor(GRID), 2, tolerance=1e-7):
        oracle = LogisticRegression(C=2 / (120 * found.strength), tol=1e-8, max_iter=5000).fit(z[0].double().numpy(), y)
        ours = found.weights[0, 0, 1] - found.weights[0, 0, 0]
        torch.testing.assert_close(ours.double(), torch.tensor(oracle.coef_[0]), atol=1e-2, rtol=1e-2)


def test_many_problems_together_equal_each_alone():
    x, y = features(3, 80, 20, 3, 0.2)
    z = standardise(x, np.arange(80))
    together = list(solve(z, torch.stack([y.roll(1), y]), torch.tensor(GRID), 3, tolerance=1e-7))
    for p in range(3):
        (alone,) = solve(z[p : p + 1], y[None], torch.tensor(GRID[1:2]), 3, tolerance=1e-7)
        torch.testing.assert_close(together[1].weights[p, 1], alone.weights[0, 0], atol=2e-3, rtol=1e-2)


def test_a_path_takes_about_as_many_steps_as_its_weakest_strength_alone():
    """The last solutions lead near the next one."""
    x, y = features(1, 300, 400, 10, 0.1)
    z, grid = standardise(x, np.arange(300)), torch.tensor(L2_GRID)
    path = sum(found.steps for found in solve(z, y[None], grid, 10))
    alone = [sum(found.steps for found in solve(z, y[None], one[None], 10)) for one in grid]
    assert path <= 1.2 * alone[0]
    assert path < 0.4 * sum(alone)


def test_predictions_without_a_doubt_are_no_reason_to_diverge():
    """Far apart and hardly penalised: Σp² rounds to more than one, and float32 allows no further step."""
    x = torch.cat([torch.zeros(1, 30, 2), 100 * torch.eye(2).repeat(15, 1)[None]], dim=2) + 1e-3
    y = torch.arange(30)[None] % 2
    path = list(solve(x, y, torch.tensor([1e6, 1e5, 1e-7]), 2))
    values = [float(found.objective) for found in path]
    assert math.log(2) > values[0] > values[1] > values[2]
    assert values[2] < 1e-5
    assert float(objective(x, y, 1e-7, path[2].weights, path[2].intercept)) == pytest.approx(values[2], abs=1e-7)


def planted(n: int = 400, seed: int = 0):
    """Layer 0 and 1 show the class, layer 2 in part, layer 3 not at all."""
    generator = torch.Generator().manual_seed(seed)
    labels = [f"class {i % 4}" for i in range(n)]
    onehot = torch.nn.functional.one_hot(torch.arange(n) % 4, 16).float()
    noise = torch.randn(4, n, 16, generator=generator)
    layers = noise + torch.tensor([9.0, 9.0, 1.5, 0.0])[:, None, None] * onehot
    return layers, labels


def test_planted_layers():
    layers, labels = planted()
    probe = fit_probes(lambda layer: layers[layer], range(4), labels, seed=1)
    rows = [row for row, _ in probe_rows(probe, target="class", middle=2, seed=1)]
    accuracy = {r.layer: r for r in rows if r.metric == "probe_accuracy" and not r.variant}
    assert accuracy[0].value == accuracy[1].value == 1.0
    assert 0.4 < accuracy[2].value < 0.9
    assert accuracy[3].value == pytest.approx(0.25, abs=0.12)
    assert accuracy[0].n == 80
    (chance,) = [r for r in rows if r.metric == "probe_chance"]
    assert chance.value == 0.25
    (drop,) = [r for r in rows if r.metric == "probe_drop"]
    assert drop.value == pytest.approx((1 - accuracy[2].value) / 0.75)
    assert drop.layer == 2
    assert 0 < drop.low < drop.value < drop.high < 1
    (worst,) = [r for r in rows if r.metric == "probe_worst_layer"]
    assert worst.layer == 3
    assert worst.value == pytest.approx((1 - accuracy[3].value) / 0.75)
    assert {r.seed for r in rows} == {1}


def test_shuffled_labels_are_at_chance():
    layers, labels = planted(n=800)
    runs = [fit_probes(lambda layer: layers[layer], [0], labels, seed=seed) for seed in range(5)]
    assert np.mean([run.shuffled for run in runs]) == pytest.approx(0.25, abs=0.05)  # 800 answers
    assert np.mean([run.correct for run in runs]) == 1.0


def test_memory_bound_does_not_change_the_result(monkeypatch):
    layers, labels = planted()
    together = fit_probes(lambda layer: layers[layer], range(4), labels)
    sizes = []

    def counted(x, y, l2, classes):
        sizes.append(len(x))
        return solve(x, y, l2, classes)

    monkeypatch.setattr("keepsight.diagnosis.probes.fit.solve", counted)
    monkeypatch.setattr("keepsight.diagnosis.probes.fit.MEMORY", 1)
    one_by_one = fit_probes(lambda layer: layers[layer], range(4), labels)
    np.testing.assert_array_equal(together.correct, one_by_one.correct)
    np.testing.assert_array_equal(together.l2, one_by_one.l2)
    assert sizes == [1, 1, 1, 1]


def test_nothing_to_lose_gives_no_drop():
    layers, labels = planted()
    probe = fit_probes(lambda layer: layers[3 - layer], range(4), labels)
    ((drop, each),) = [r for r in probe_rows(probe, target="", middle=2, seed=0) if r[0].metric == "probe_drop"]
    assert each is None
    assert drop.value is None
    assert "is not above chance (0.250), so there is nothing to lose" in drop.note


def test_split_is_stratified_disjoint_and_seeded():
    labels = ["a"] * 50 + ["b"] * 10 + ["c"] * 2
    split = stratified_split(labels, 0)
    everything = np.concatenate([split.train, split.validation, split.test])
    assert sorted(everything) == list(range(62))
    counts = [
        [sum(labels[i] == name for i in part) for name in "abc"] for part in (split.train, split.validation, split.test)
    ]
    assert counts == [[30, 6, 1], [10, 2, 0], [10, 2, 1]]
    np.testing.assert_array_equal(split.test, stratified_split(labels, 0).test)
    assert split.test.tolist() != stratified_split(labels, 1).test.tolist()


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (["cat", "cat", "cat", "dog"], r"class 'dog' has one picture \(1 such classes\); a probe needs at least two"),
        (["cat"] * 5, r"at least two classes; got \['cat'\]"),
        (["cat", "cat", "dog", "dog"], "no class has three pictures"),
    ],
)
def test_too_few_pictures(labels, text):
    with pytest.raises(ValueError, match=text):
        stratified_split(labels, 0)


def test_wilson_by_hand():
    # z = 1.96, 8 of 10: (0.8 + 0.19207) / 1.38415 ± 1.96 / 1.38415 · sqrt(0.016 + 0.009604)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(10, 10)[1] == pytest.approx(1.0)


def test_paired_bootstrap_is_narrower_than_unpaired_and_covers():
    generator = np.random.default_rng(0)
    first = generator.random(500) < 0.9
    layer = first & (generator.random(500) < 0.8)
    majority = np.arange(500) % 5 == 0
    value, low, high = drop_with_interval(first, layer, majority, seed=0)
    assert value == pytest.approx((first.mean() - layer.mean()) / (first.mean() - majority.mean()))
    assert low < value < high
    unpaired = drop_with_interval(first, generator.permutation(layer), majority, seed=0)
    assert high - low < unpaired[2] - unpaired[1]


def test_constant_features_are_ignored():
    layers, labels = planted()
    with_constant = torch.cat([layers, torch.full((4, 400, 3), 1e4)], dim=2)
    a = fit_probes(lambda layer: layers[layer], range(4), labels)
    b = fit_probes(lambda layer: with_constant[layer], range(4), labels)
    np.testing.assert_array_equal(a.correct, b.correct)


def test_a_drop_whose_interval_has_no_end_has_none_and_says_why():
    """9 of 20 right at layer 0, 7 above, 5 by chance: Wilson leaves chance out, some resamples do not."""
    numbers = np.arange(20)
    first, layer, majority = numbers < 9, numbers < 7, (numbers < 2) | (numbers > 16)
    assert wilson(9, 20)[0] > 5 / 20
    assert drop_with_interval(first, layer, majority, seed=0)[2] == np.inf
    nothing = np.zeros(2)
    right, shuffled = np.stack([first, layer]), np.zeros((2, 20), dtype=bool)
    probe = Probe([0, 2], numbers, nothing, nothing + 1, right, shuffled, nothing + 1, majority)
    for metric in ("probe_drop", "probe_worst_layer"):
        (row,) = [row for row, _ in probe_rows(probe, target="t", middle=2, seed=0) if row.metric == metric]
        assert (row.value, row.low, row.high) == (pytest.approx((9 - 7) / (9 - 5)), None, None)
        assert "no interval: in resamples of the test images layer 0 is not above chance" in row.note


class OnDisk:
    """Features of which only a few rows may be asked for at once."""

    def __init__(self, x: torch.Tensor, most: int) -> None:
        self.x, self.most, self.shape, self.asked = x, most, x.shape, 0

    def __getitem__(self, rows: np.ndarray) -> torch.Tensor:
        assert len(rows) <= self.most
        self.asked += len(rows)
        return self.x[rows]


def test_a_layer_read_block_by_block_answers_alike(monkeypatch):
    layers, labels = planted(n=400)
    layers[:, :, 3] = 2.5  # a constant feature
    layers[1] = layers[2] * torch.logspace(-3, 3, 16) + 1e3  # large means and badly conditioned
    layers[2] += 0.05 * torch.arange(400)[:, None]  # blocks of different means
    whole = fit_probes(lambda layer: layers[layer], range(4), labels, seed=3)
    monkeypatch.setattr("keepsight.diagnosis.probes.fit.FEATURES_MEMORY", 1)
    monkeypatch.setattr("keepsight.diagnosis.probes.fit.BLOCK", 20_000)
    stored = {layer: OnDisk(layers[layer], 60) for layer in range(4)}
    streamed = fit_probes(stored.__getitem__, range(4), labels, seed=3)
    for name in ("correct", "shuffled"):
        assert (getattr(whole, name) != getattr(streamed, name)).mean() < 0.01, name
    np.testing.assert_array_equal(whole.l2, streamed.l2)
    np.testing.assert_allclose(whole.validation, streamed.validation, atol=0.013)  # one of 80 pictures
    assert stored[0].asked > 10 * 240  # a pass a step


def test_block_by_block_solves_scikit_learns_problem():
    x, y = features(1, 300, 30, 4, 0.1)
    z, targets = standardise(x, np.arange(300))[0], torch.stack([y, y.roll(1)])
    blocks = partial(zip, z.split(110), targets.split(110, dim=1))
    for found in solve_streamed(blocks, 2, torch.tensor(GRID), 4):
        ours = objective(z[None], targets, found.strength, found.weights, found.intercept)
        torch.testing.assert_close(ours, found.objective, rtol=1e-4, atol=1e-7)
        for t, target in enumerate(targets):
            assert ours[0, t].item() == pytest.approx(optimum(z, target, found.strength)[1], rel=1e-3)


@pytest.mark.parametrize("features_memory", [4 << 30, 1])
def test_probes_keep_to_their_device(monkeypatch, features_memory):
    layers, labels = planted(n=120)
    monkeypatch.setattr("keepsight.diagnosis.probes.fit.FEATURES_MEMORY", features_memory)
    expected = fit_probes(lambda layer: layers[layer], range(4), labels)
    with Accelerator():
        found = fit_probes(lambda layer: layers[layer], range(4), labels, device=DEVICE)
    np.testing.assert_array_equal(found.correct, expected.correct)
    np.testing.assert_array_equal(found.l2, expected.l2)


def test_a_mixture_of_devices_would_be_seen():
    with Accelerator():
        there = torch.ones(3, device=DEVICE)
        assert float((there * 2.0).sum()) == 6.0
        with pytest.raises(AssertionError, match="mixes tensors of the accelerator"):
            there + torch.ones(3)
