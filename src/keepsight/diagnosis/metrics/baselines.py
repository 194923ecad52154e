"""What fidelity is compared with: a split by image, tokens of other images at the same place, and the place alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from keepsight.diagnosis.collect.accumulate import BLOCK
from keepsight.diagnosis.metrics.ridge import TEST, TRAIN, VALIDATION, Moments, Score, per_image, score_of

SHRINKAGE = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)  # of the means of a place, in tokens


def split_images(n: int, seed: int) -> np.ndarray:
    """[n] TRAIN, VALIDATION or TEST of each image: 60, 20 and 20 %, shuffled with the seed."""
    order = np.random.default_rng([seed, 6]).permutation(n)
    part = np.full(n, TRAIN)
    fifth = max(1, round(0.2 * n))
    part[order[:fifth]] = TEST
    part[order[fifth : 2 * fifth]] = VALIDATION
    return part


def partners(part: np.ndarray, place: np.ndarray, image: np.ndarray, seed: int) -> np.ndarray:
    """[n]: for each token one of another image of the same part, at the same place.

    Where the part holds a place once, any token of another image takes its stead.
    """
    generator = np.random.default_rng([seed, 7])
    found = np.arange(len(part))
    for one in (TRAIN, VALIDATION, TEST):
        members = generator.permutation(np.flatnonzero(part == one))
        members = members[np.argsort(place[members], kind="stable")]
        edges = np.flatnonzero(np.diff(place[members])) + 1
        for group in np.split(members, edges):
            found[group] = np.roll(group, 1)
            if len(group) == 1 and len(others := members[image[members] != image[group[0]]]):
                found[group] = generator.choice(others)
    return found


def place_score(read: Callable[[np.ndarray], Tensor], part: np.ndarray, place: np.ndarray, image: np.ndarray) -> Score:
    """A target predicted by its mean over the training tokens at the same place, shrunk to the overall mean.

    Args:
        read: from tokens' numbers to the target [rows, m].
        part, place, image: [n], of each token.

    Returns:
        Its score on the test tokens; the strength is the shrinkage, chosen on validation.
    """
    place = np.unique(place, return_inverse=True)[1]
    images = int(image.max()) + 1
    chunks = [np.arange(start, min(start + BLOCK, len(part))) for start in range(0, len(part), BLOCK)]
    moments = Moments()
    for rows in chunks:
        y = read(rows[part[rows] == TRAIN])
        if len(y):
            moments.add(y)
    scale = moments.scale()
    total = torch.zeros(int(place.max()) + 1, len(scale.mean), dtype=torch.float64)
    count = torch.from_numpy(np.bincount(place[part == TRAIN], minlength=len(total))).double()[:, None]
    for rows in chunks:
        chosen = rows[part[rows] == TRAIN]
        total.index_add_(0, torch.from_numpy(place[chosen]), scale(read(chosen)).cpu())

    def guess(at: Tensor, shrinkage: float) -> Tensor:
        return total[at] / (count[at] + shrinkage).clamp(min=1e-9)  # a place never seen: the overall mean, 0

    errors = np.zeros(len(SHRINKAGE))
    for rows in chunks:
        chosen = rows[part[rows] == VALIDATION]
        truth, at = scale(read(chosen)).cpu(), torch.from_numpy(place[chosen])
        errors += [float((guess(at, shrinkage) - truth).square().sum()) for shrinkage in SHRINKAGE]
    best = SHRINKAGE[len(errors) - 1 - int(errors[::-1].argmin())]
    table = np.zeros((4, images))
    for rows in chunks:
        chosen = rows[part[rows] == TEST]
        truth, at = scale(read(chosen)).cpu(), torch.from_numpy(place[chosen])
        table += per_image(guess(at, best), truth, image[chosen], images)
    return score_of(best, table, np.unique(image[part == TEST]), scale.constant)
