"""Patch structure by size and class of the objects, on planted tokens."""

import numpy as np
import pytest
import torch

from keepsight.diagnosis.collect.accumulate import Accumulator
from keepsight.diagnosis.collect.batch import Batch
from keepsight.diagnosis.collect.calibrate import LayerCalibration
from keepsight.diagnosis.metrics.breakdown import object_rows
from keepsight.results import PerImageBuilder

IMAGES, TOKENS = 12, 64


@pytest.fixture
def planted(tmp_path):
    """Twelve images; a cat of 4 patches with cosine 1 inside and 0 outside, a dog of 10 whose patches are opposite in
    halves; the rest orthogonal to both. The last image's cat has one patch; the first two dogs are of no known class.
    """
    accumulator = Accumulator([3], 80, {3: calibration()}, tmp_path, by_object=True)
    for image in range(IMAGES):
        tokens = torch.zeros(TOKENS, 80)
        tokens[:4, 70] = 1.0
        tokens[4:9, 71], tokens[9:14, 71] = 1.0, -1.0
        tokens[14:, :50] = torch.eye(50)
        members = torch.zeros(2, TOKENS, dtype=torch.bool)
        members[0, : 1 if image == IMAGES - 1 else 4] = True
        members[1, 4:14] = True
        classes = ["cat", "" if image < 2 else "dog"]
        accumulator.begin(batch(members, classes))
        accumulator.sink(3, tokens)
        accumulator.append(accumulator.end([image]))
    return accumulator


def calibration():
    zero, one = torch.zeros(80), torch.ones(80)
    return LayerCalibration(mean=zero, mean_without_sinks=zero, threshold=10.0, channels=one, has_sinks=False)


def batch(members, classes):
    image = torch.zeros(TOKENS, dtype=torch.long)
    nothing = torch.zeros(TOKENS, dtype=torch.bool)
    first = torch.zeros(1, dtype=torch.long)
    return Batch(
        image=image,
        n_images=1,
        thumbnail=nothing,
        objects=members,
        owner=torch.tensor([0, 0]),
        sample=torch.arange(4),
        group=first,
        place=torch.arange(TOKENS),
        counted=first.bool(),
        classes=classes,
    )


def test_sizes_and_classes_have_their_own_numbers(planted):
    builder = PerImageBuilder([f"{i}" for i in range(IMAGES)])
    rows = object_rows(planted, builder, seed=0)
    found = {(r.metric, r.target): r for r in rows if r.variant == "raw" and r.tokens == "all"}
    inside = (5 * 4 * 2 - 2 * 25) / 90  # pairs in the same half, less those across
    for target, cohesion, n, objects in (
        ("objects: small", 1.0, 11, "11 objects of 2 to 5 patches"),
        ("objects: medium", inside, 12, "12 objects of 6 to 47 patches"),
        ("objects: cat", 1.0, 11, "11 objects"),
        ("objects: dog", inside, 10, "10 objects"),
    ):
        row = found["cohesion", target]
        assert (row.n, row.note, row.layer) == (n, objects, 3)
        assert row.value == pytest.approx(cohesion, abs=1e-6)
        assert found["gap", target].value == pytest.approx(cohesion, abs=1e-6)  # the rest is orthogonal
    large = found["gap", "objects: large"]
    assert (large.value, large.note) == (None, "no object of this size (48 or more patches)")
    assert not [r for r in rows if r.target.endswith("dog") and r.tokens != "all"]
    shares = builder.finish().of(found["cohesion", "objects: small"].key)
    assert np.isnan(shares[-1])
    assert shares[:-1] == pytest.approx(1.0)


def test_rare_classes_have_no_rows(planted, monkeypatch):
    monkeypatch.setattr("keepsight.diagnosis.metrics.breakdown.FEWEST", 11)
    targets = {r.target for r in object_rows(planted, PerImageBuilder([f"{i}" for i in range(IMAGES)]), seed=0)}
    assert targets == {"objects: small", "objects: medium", "objects: large", "objects: cat"}
