"""The shipped weights do what their card says."""

import pytest
import torch

from keepsight.testbed import models
from keepsight.testbed._evaluate import evaluate, linear_accuracy


def test_weights_are_small_and_finite():
    assert sum(f.stat().st_size for f in models.WEIGHTS.iterdir()) < 20e6
    encoder = models.load_encoder()
    assert all(torch.isfinite(p).all() for p in encoder.parameters())
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert not encoder.training


def test_linear_probe_finds_what_is_linear_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1200, 8, generator=generator)
    y = x[:, :4].argmax(dim=1)  # a linear rule
    assert linear_accuracy(x[:800], y[:800], x[800:], y[800:]) > 0.9
    y = torch.randint(4, (1200,), generator=generator)
    assert abs(linear_accuracy(x[:800], y[:800], x[800:], y[800:]) - 0.25) < 0.08


@pytest.mark.slow
def test_parts_are_as_good_as_the_card_says():
    figures = evaluate()
    for name in ("shape", "color"):
        assert figures[f"encoder, object patches: {name}"] > 0.9
    for language in models.LANGUAGES:
        assert figures[f"{language}, questions about a described scene"] > 0.9
    # Clearly above chance, yet with room: else nothing could be seen to decay.
    for target in ("texture", "orientation", "lighting", "tint"):
        assert 0.7 < figures[f"encoder, mean of the patches: {target}"] < 0.98
