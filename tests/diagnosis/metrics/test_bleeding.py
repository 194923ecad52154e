"""Bleeding against the definition patch by patch in float64, ties included, and planted answers."""

import numpy as np
import pytest
import torch

from keepsight.diagnosis.metrics.bleeding import bleeding
from keepsight.diagnosis.metrics.structure import Groups


def naive(tokens, members):
    """[K] by the words of the definition: tokens [N, d] of one image, members bool [K, N]; NaN where undefined."""
    unit = tokens.double().numpy()
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-30)
    cosine = unit @ unit.T
    found = []
    for inside in members.numpy():
        n, total = int(inside.sum()), len(inside)
        if n < 2 or n == total:
            found.append(np.nan)
            continue
        excess = []
        for i in np.flatnonzero(inside):
            rest = [j for j in range(total) if j != i]
            left, out = float(n - 1), 0.0
            for level in sorted({round(cosine[i, j], 9) for j in rest}, reverse=True):
                tied = [j for j in rest if round(cosine[i, j], 9) == level]
                taken = min(left, len(tied))
                out += taken * np.mean([not inside[j] for j in tied])
                left -= taken
            excess.append(out / (n - 1) - (total - n) / (total - 1))
        found.append(np.mean(excess))
    return found


def batch(seed, ties):
    """Three images of 12, 7 and 9 tokens with 2, 0 and 3 objects; with `ties` many tokens are equal or zero."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (12, 7, 9)
    image = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    tokens = torch.randn(28, 5, generator=generator) + 0.5
    if ties:
        tokens[torch.randperm(28, generator=generator)[:14]] = tokens[0].clone()
        tokens[[3, 22]] = 0.0
    objects, owner = torch.zeros(5, 28, dtype=torch.bool), torch.tensor([0, 0, 2, 2, 2])
    objects[0, [0, 2, 3, 7]] = True
    objects[1, [1, 4, 5, 6, 8, 9, 3]] = True  # token 3 is in both
    objects[2, [19, 20, 22, 25]] = True
    objects[3, [21]] = True  # alone
    objects[4, 19:28] = True  # nothing outside
    return tokens, image, objects, owner


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("chunk", [1 << 22, 30])
def test_equals_the_definition(seed, ties, chunk, monkeypatch):
    monkeypatch.setattr("keepsight.diagnosis.metrics.bleeding.CHUNK", chunk)
    tokens, image, objects, owner = batch(seed, ties)
    groups = Groups.build(image, 3, objects, owner)
    expected = [naive(tokens[image == o], objects[[k]][:, image == o])[0] for k, o in enumerate(owner)]
    np.testing.assert_allclose(bleeding(tokens, groups.near).numpy(), expected, atol=1e-5)
    centre, channels = torch.full((5,), 0.5), torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    changed = (tokens - centre) * channels
    expected = [naive(changed[image == o], objects[[k]][:, image == o])[0] for k, o in enumerate(owner)]
    np.testing.assert_allclose(bleeding(tokens, groups.near, centre, channels).numpy(), expected, atol=1e-5)


def test_tokens_left_out_are_neither_patches_nor_neighbours():
    tokens, image, objects, owner = batch(0, True)
    kept = torch.ones(28, dtype=torch.bool)
    kept[[0, 5, 20]] = False
    groups = Groups.build(image, 3, objects, owner).keep(kept)
    expected = [
        naive(tokens[kept & (image == o)], objects[[k]][:, kept & (image == o)])[0] for k, o in enumerate(owner)
    ]
    np.testing.assert_allclose(bleeding(tokens, groups.near).numpy(), expected, atol=1e-5)


def test_planted():
    """Separate objects: −chance. All tokens equal: 0. Neighbours outside only: 1 − chance."""
    image, owner = torch.zeros(8, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    objects = torch.arange(8)[None] < 4
    groups = Groups.build(image, 1, objects, owner)
    apart = torch.eye(2).repeat_interleave(4, dim=0)
    assert bleeding(apart, groups.near).item() == pytest.approx(-4 / 7)
    assert bleeding(torch.ones(8, 3), groups.near).item() == pytest.approx(0.0, abs=1e-6)
    pair = Groups.build(image, 1, torch.arange(8)[None] < 2, owner)
    crossed = torch.eye(8)
    crossed[0, 5], crossed[1, 6] = 0.9, 0.9
    assert bleeding(crossed, pair.near).item() == pytest.approx(1 - 6 / 7)


def test_no_objects():
    groups = Groups.build(torch.zeros(4, dtype=torch.long), 1)
    assert bleeding(torch.ones(4, 2), groups.near).shape == (0,)
