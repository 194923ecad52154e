"""The spectrum against hand-computed values, scikit-learn, planted spectra and brute-force resampling."""

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from keepsight.diagnosis.metrics.spectrum import (
    CovarianceSums,
    channel_norms,
    components,
    correlation,
    covariance_of,
    eigen,
    entropy_rank,
    feature_correlation,
    jackknife,
    participation_ratio,
    spectrum,
)


def sums_of(
    tokens: torch.Tensor, groups: int = 10, shift: torch.Tensor | None = None, chunk: int = 37
) -> CovarianceSums:
    sums = CovarianceSums(tokens.shape[1], groups, shift)
    for i, part in enumerate(tokens.split(chunk)):
        sums.update(part, i % groups)
    return sums


def mixed(n: int = 700, d: int = 20, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator) * torch.logspace(0, -1.5, d)
    return torch.randn(n, d, generator=generator) @ mixing


def test_by_hand():
    eigenvalues = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    matrix = torch.diag(eigenvalues)
    assert participation_ratio(matrix) == pytest.approx(100 / 30)
    assert entropy_rank(eigenvalues).item() == pytest.approx(0.4**-0.4 * 0.3**-0.3 * 0.2**-0.2 * 0.1**-0.1)
    assert components(eigenvalues, (0.4, 0.41, 0.7, 0.9, 0.95)).tolist() == [1, 2, 2, 3, 4]
    assert components(eigenvalues, (0.55,), fractional=True).item() == pytest.approx(1.5)
    pearson = torch.tensor([[1.0, 0.5, -0.2], [0.5, 1.0, 0.0], [-0.2, 0.0, 1.0]])
    assert feature_correlation(pearson) == pytest.approx(0.7 / 3)


def test_streamed_covariance_equals_numpy():
    tokens = mixed()
    sums = sums_of(tokens)
    np.testing.assert_allclose(covariance_of(*sums.total()), np.cov(tokens.double().T, bias=True), atol=1e-5)
    kept = torch.cat([part for i, part in enumerate(tokens.split(37)) if i % 10 != 3])
    np.testing.assert_allclose(
        covariance_of(*(a - b for a, b in zip(sums.total(), sums.group(3), strict=True))),
        np.cov(kept.double().T, bias=True),
        atol=1e-5,
    )
    pearson, live = correlation(covariance_of(*sums.total()))
    np.testing.assert_allclose(pearson, np.corrcoef(tokens.double().T), atol=1e-5)
    assert live.all()
    np.testing.assert_allclose(channel_norms(sums), tokens.double().square().mean(0).sqrt(), rtol=1e-5)


def test_shift_keeps_a_small_variance_beside_a_large_common_direction():
    tokens = mixed() + 3000.0
    expected = np.cov(tokens.double().T, bias=True)
    sums = sums_of(tokens, shift=tokens[:5].mean(dim=0))
    np.testing.assert_allclose(covariance_of(*sums.total()), expected, atol=1e-3, rtol=1e-3)
    np.testing.assert_allclose(channel_norms(sums), tokens.double().square().mean(0).sqrt(), rtol=1e-6)
    without_shift = covariance_of(*sums_of(tokens).total()).numpy()
    assert np.abs(without_shift - expected).max() > 0.01  # what the shift is for


def test_agrees_with_scikit_learn():
    tokens = mixed()
    found = spectrum(sums_of(tokens))
    for variant, data in (
        ("covariance", tokens.double()),
        ("correlation", (tokens.double() - tokens.double().mean(0)) / tokens.double().std(0)),
    ):
        ratio = PCA().fit(data.numpy()).explained_variance_ratio_
        assert found["participation_ratio", variant].value == pytest.approx(1 / (ratio**2).sum(), rel=1e-5)
        assert found["entropy_rank", variant].value == pytest.approx(np.exp(-(ratio * np.log(ratio)).sum()), rel=1e-5)
        for share in (90, 95, 99):
            expected = PCA(n_components=share / 100, svd_solver="full").fit(data.numpy()).n_components_
            assert found[f"components_{share}", variant].value == expected
    pearson = np.corrcoef(tokens.double().T)
    expected = np.abs(pearson[np.triu_indices(20, 1)]).mean()
    assert found["feature_correlation", ""].value == pytest.approx(expected, rel=1e-5)


def test_eigenvalues_of_float32_vectors_are_good_to_float64():
    basis = torch.linalg.qr(torch.randn(200, 200, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q
    planted = torch.logspace(0, -3, 200, dtype=torch.float64)
    planted[120:] = 0
    matrix = (basis * planted) @ basis.T
    found, vectors = eigen(matrix)
    assert vectors.dtype is torch.float32
    torch.testing.assert_close(found.sort(descending=True).values, planted, rtol=0, atol=1e-10)
    rounded = torch.linalg.eigvalsh(matrix.float()).double().sort(descending=True).values
    assert (rounded - planted).abs().max() > 1e-7  # what the quotients are for


def test_planted_dimension():
    """Five equal directions in twelve channels, and one direction only."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(12, 5, generator=generator)).Q
    tokens = torch.randn(40000, 5, generator=generator) @ basis.T + 7.0
    found = spectrum(sums_of(tokens, shift=torch.full((12,), 7.0), chunk=1000))
    for name in ("participation_ratio", "entropy_rank"):
        estimate = found[name, "covariance"]
        assert estimate.value == pytest.approx(5, rel=2e-3)
        assert estimate.low < estimate.value < estimate.high
    assert found["components_99", "covariance"].value == 5
    line = spectrum(sums_of(torch.randn(500, 1, generator=generator) * torch.arange(1.0, 5.0)))
    assert line["participation_ratio", "covariance"].value == pytest.approx(1, abs=1e-5)
    assert line["feature_correlation", ""].value == pytest.approx(1, abs=1e-5)


def test_constant_channels_are_left_out_and_counted():
    tokens = torch.cat([mixed(), torch.full((700, 2), 3.0)], dim=1)
    found, bare = spectrum(sums_of(tokens)), spectrum(sums_of(mixed()))
    assert found["feature_correlation", ""].value == pytest.approx(bare["feature_correlation", ""].value)
    assert found["entropy_rank", "correlation"].value == pytest.approx(bare["entropy_rank", "correlation"].value)
    assert found["feature_correlation", ""].note == "2 constant channels left out"


def test_nothing_to_measure_is_said():
    found = spectrum(sums_of(torch.full((30, 4), 2.0), shift=torch.full((4,), 2.0)))
    assert {e.value for e in found.values()} == {None}
    assert found["entropy_rank", "covariance"].note == "the tokens of this layer do not vary"
    assert spectrum(CovarianceSums(4))["feature_correlation", ""].note == "0 tokens"


def test_jackknife_of_a_mean_is_the_usual_interval():
    values = [3.0, 5.0, 4.0, 8.0, 6.5]
    mean = sum(values) / 5
    without = [(sum(values) - v) / 4 for v in values]
    low, high = jackknife(mean, without, [1.0] * 5, log=False)
    half = 2.7764451 * np.std(values, ddof=1) / math.sqrt(5)
    assert (low, high) == pytest.approx((mean - half, mean + half), rel=1e-6)
    assert jackknife(mean, without[:1], [1.0], log=False) is None


@pytest.mark.slow
def test_interval_covers_what_repeated_samples_show():
    """Tokens of an image are alike: the interval must come from images, not from tokens."""

    def sample(seed: int) -> CovarianceSums:
        generator = torch.Generator().manual_seed(seed)
        scale = torch.logspace(0, -1, 8)
        images = torch.randn(100, 1, 8, generator=generator) * scale
        tokens = images + 0.3 * torch.randn(100, 16, 8, generator=generator) * scale
        sums = CovarianceSums(8, 10)
        for i, part in enumerate(tokens):
            sums.update(part, i % 10)
        return sums

    runs = [spectrum(sample(seed)) for seed in range(40)]
    for key in (("participation_ratio", "covariance"), ("entropy_rank", "covariance"), ("entropy_rank", "correlation")):
        values = np.array([run[key].value for run in runs])
        halves = np.array([np.log(run[key].high / run[key].low) / 2 for run in runs]) / 2.262
        # standard error given by the jackknife against the spread of the values themselves
        assert halves.mean() == pytest.approx(np.log(values).std(), rel=0.35), key
