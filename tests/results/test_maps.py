"""Similarity maps: what is read back against the cosines themselves, and the errors that are stated."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from keepsight.results import Example, RunDirectory
from keepsight.results.maps import COMPONENTS, SimilarityMap, compress


def cosines(tokens):
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    return unit @ unit.T


def tokens_of(n, d, decay, seed=0):
    """Tokens with a shared direction and a spectrum that falls as 1/k^decay."""
    generator = np.random.default_rng(seed)
    return generator.normal(size=(n, d)) / np.arange(1, d + 1) ** decay + 0.3 * generator.normal(size=d)


def map_of(*layers):
    packed = [compress(tokens) for tokens in layers]
    codes, error, worst = (np.stack(part) for part in zip(*packed, strict=True))
    n = codes.shape[1]
    return SimilarityMap(
        layers=np.array([0, 3][: len(layers)], dtype=np.int16),
        codes=codes,
        error=error.astype(np.float32),
        worst=worst.astype(np.float32),
        centres=np.zeros((n, 2), np.float32),
        tile=np.zeros(n, np.int16),
        row=np.zeros(n, np.int16),
        column=np.arange(n, dtype=np.int16),
    )


def test_cosines_come_back_within_the_stated_error():
    layers = [tokens_of(200, 300, 1.0), np.random.default_rng(1).normal(size=(200, 300))]
    found = map_of(*layers)
    for position, (layer, tokens) in enumerate(zip((0, 3), layers, strict=True)):
        again = np.stack([found.similarity(layer, token) for token in range(200)])
        assert again.shape == (200, 200)
        difference = (again - cosines(tokens))[~np.eye(200, dtype=bool)]
        assert np.sqrt((difference**2).mean()) == pytest.approx(found.error[position], rel=1e-4)
        assert np.abs(difference).max() == pytest.approx(found.worst[position], rel=1e-3)
        assert (again.diagonal() == 1).all()
    assert found.error[0] < 0.02 < found.error[1]  # a flat spectrum is lost, and said to be


def test_few_directions_are_kept_exactly_but_for_the_steps():
    codes, error, worst = compress(np.random.default_rng(0).normal(size=(100, COMPONENTS - 4)))
    assert (codes.dtype, codes.shape) == (np.int8, (100, COMPONENTS))
    assert error < 0.01
    assert worst < 0.05


def test_better_than_a_random_projection_of_as_many_numbers():
    tokens = tokens_of(300, 400, 1.0)
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    sketch = unit @ np.random.default_rng(1).normal(size=(400, COMPONENTS)) / np.sqrt(COMPONENTS)
    random = np.sqrt(((sketch @ sketch.T - cosines(tokens))[~np.eye(300, dtype=bool)] ** 2).mean())
    assert compress(tokens)[1] < random / 5


@pytest.mark.parametrize("n", [1, 2, 10])
def test_small_pictures_and_zero_tokens(n):
    tokens = np.random.default_rng(0).normal(size=(n, 5))
    tokens[0] = 0.0
    found = map_of(tokens)
    assert found.similarity(0, 0).tolist() == pytest.approx([1.0] + [0.0] * (n - 1), abs=1e-6)


def test_bytes_and_bad_input(tmp_path):
    found = map_of(tokens_of(30, 40, 1.0), tokens_of(30, 40, 1.0, seed=1))
    assert found.word(3, 7) is None
    top = np.arange(60, dtype=np.int32).reshape(2, 30) % 2
    found = replace(found, words=np.array([" a", "</b>"]), top=top, thumbnail=np.zeros(30, dtype=bool))
    again = SimilarityMap.from_bytes(found.to_bytes())
    assert np.array_equal(again.similarity(3, 7), found.similarity(3, 7))
    assert [again.word(0, 0), again.word(3, 7)] == [" a", "</b>"]
    with pytest.raises(ValueError, match=r"layer 1, token 0: allowed are the layers \[0, 3\] and tokens 0 to 29"):
        found.similarity(1, 0)
    with pytest.raises(ValueError, match="token 30: allowed"):
        found.similarity(0, 30)
    with pytest.raises(ValueError, match="not a similarity map, or a damaged one"):
        SimilarityMap.from_bytes(found.to_bytes()[:200])


def test_in_a_runs_folder(tmp_path):
    found = map_of(tokens_of(30, 40, 1.0))
    image = Image.new("RGB", (8, 8))
    with RunDirectory.staged(tmp_path / "run", kind="diagnosis", label="a", model="m", fingerprint="f") as run:
        run.write_rows([])
        run.write_examples([Example(image, map=found), Example(image)])
    first, second = RunDirectory.open(run.path).read_examples()
    assert first.map is not None
    assert np.array_equal(first.map.similarity(0, 4), found.similarity(0, 4))
    assert second.map is None
    assert replace(first, map=None).name == ""


def test_size_of_thirty_pictures():
    """576 patches with the spectrum of noise, which compresses worst: what 33 layers of 30 pictures take in base64."""
    one = map_of(np.random.default_rng(0).normal(size=(576, 64)))
    assert len(one.to_bytes()) * 33 * 30 * 4 / 3 < 25e6
