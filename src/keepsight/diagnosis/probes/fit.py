"""Fits of a probe: several layers together in memory, or one layer that is read from the disk block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from keepsight.diagnosis.probes.logistic import Solution, solve, solve_streamed

MEMORY = 16 << 20  # bytes that the layers fitted together on a CPU may take: about what its caches hold
FEATURES_MEMORY = 4 << 30  # bytes that the features of one layer may take in memory
BLOCK = 256 << 20  # bytes that a block may take that is read from the disk

Fit = tuple[np.ndarray, ...]  # accuracy in validation [P], strength [P], right in the test [P, n]


class Features(Protocol):
    """[n, d] features of one layer that may lie on the disk: rows are read as they are asked for. Tensors are some."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, rows: Any, /) -> Any: ...


@dataclass(frozen=True)
class Split:
    """Indices of the training, validation and test images."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def layers_memory(device: torch.device | str) -> int:
    """Bytes that the layers fitted together may take: a GPU gains from more layers as long as they fit."""
    if torch.device(device).type == "cuda":
        return max(MEMORY, torch.cuda.mem_get_info(device)[0] // 4)
    return MEMORY


def streams(n: int, d: int) -> bool:
    """Whether a layer of n training pictures is read block by block."""
    return n > d and _bytes_of_features(n, d) > FEATURES_MEMORY


def bytes_of_layer(n: int, d: int, classes: int, targets: int = 2) -> int:
    """What fitting one layer on n training pictures takes at most, from its features to the best strength."""
    if streams(n, d):
        return 48 * d * d + BLOCK + targets * _bytes_per_target(0, d, classes)
    return _bytes_of_features(n, d) + targets * _bytes_per_target(n, d, classes)


def _bytes_of_features(n: int, d: int) -> int:
    width = min(n, d)
    return 4 * (3 * n * d + 2 * n * width + 3 * width * width)


def _bytes_per_target(n: int, d: int, classes: int) -> int:
    """Logits of n pictures kept from step to step; parameters, gradients and a history; weights to choose from."""
    return 4 * classes * (8 * n + 30 * (min(n, d) if n else d) + 4 * d)


def standardise(x: Tensor, train: np.ndarray) -> Tensor:
    """[P, n, d] float32 with mean 0 and variance 1 over the training images; constant features become 0."""
    part = x[:, train].double()
    mean, scale = _scale(part.mean(dim=1, keepdim=True), part.var(dim=1, correction=0, keepdim=True))
    return ((x - mean) * scale).float()


def _scale(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1/deviation in float32, from float64."""
    deviation = variance.sqrt()
    # A deviation at the level of float32 rounding is a constant feature, not information.
    constant = deviation <= 1e-6 * mean.abs() + 1e-30
    return mean.float(), torch.where(constant, 0.0, 1 / deviation.clamp(min=1e-30)).float()


def fit(x: Tensor, targets: Tensor, split: Split, l2: Tensor, classes: int) -> list[Fit]:
    """A probe of each of P layers, for each of the targets; all data on one device.

    Args:
        x: [P, n, d] features.
        targets: [T, n] class indices to learn; the first are the true ones, which every test is scored by.
        l2: [R] strengths, of which validation chooses one.
    """
    z = standardise(x, split.train)
    del x
    path = solve(z[:, split.train], targets[:, split.train], l2, classes)

    def predict(rows: np.ndarray, weights: Tensor, intercept: Tensor) -> Tensor:
        return _predict(z[:, rows], weights, intercept)

    return _outcomes(path, predict, targets, split)


def fit_streamed(x: Features, targets: Tensor, split: Split, l2: Tensor, classes: int) -> list[Fit]:
    """The same for one layer whose features [n, d] never are in memory together."""
    size = max(1, BLOCK // (16 * (x.shape[1] + 2 * len(targets) * classes)))

    def read(rows: np.ndarray) -> Iterator[tuple[Tensor, np.ndarray]]:
        for part in np.array_split(rows, -(-len(rows) // size)):
            yield torch.as_tensor(x[part]).to(l2.device), part

    mean, scale = _scale(*_moments(block for block, _ in read(split.train)))

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        for block, part in read(split.train):
            yield (block - mean) * scale, targets[:, part]

    def predict(rows: np.ndarray, weights: Tensor, intercept: Tensor) -> Tensor:
        found = [_predict(((block - mean) * scale)[None], weights, intercept) for block, _ in read(rows)]
        return torch.cat(found, dim=2)

    return _outcomes(solve_streamed(blocks, len(targets), l2, classes), predict, targets, split)


def _moments(blocks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance [d] in float64, block by block (Chan, Golub and LeVeque 1983)."""
    n, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for block in blocks:
        x = block.double()
        own, more = x.mean(dim=0), len(x)
        off = own - mean.to(own)
        squares = squares.to(own) + (x - own).square().sum(dim=0) + off.square() * (n * more / (n + more))
        mean, n = mean.to(own) + off * (more / (n + more)), n + more
    return mean, squares / n


def _outcomes(
    path: Iterable[Solution], predict: Callable[[np.ndarray, Tensor, Tensor], Tensor], targets: Tensor, split: Split
) -> list[Fit]:
    """Of each target: validation accuracy and strength of the best fits, and whether their test answers are right."""
    best: tuple[Tensor, ...] = ()
    for found in path:
        guess = predict(split.validation, found.weights, found.intercept)  # [P, T, n]
        accuracy = (guess == targets[:, split.validation]).double().mean(dim=2)
        mine: tuple[Tensor, ...] = (accuracy, torch.full_like(accuracy, found.strength), found.weights, found.intercept)
        if best:
            # Of equally good strengths, the strongest, which comes first: the simpler classifier.
            better = accuracy > best[0]
            mine = tuple(
                torch.where(better.view(better.shape + (1,) * (new.ndim - 2)), new, old)
                for new, old in zip(mine, best, strict=True)
            )
        best = mine
    accuracy, strength, weights, intercept = best
    right = predict(split.test, weights, intercept) == targets[0, split.test]
    return [tuple(one[:, t].cpu().numpy() for one in (accuracy, strength, right)) for t in range(len(targets))]


def _predict(z: Tensor, weights: Tensor, intercept: Tensor) -> Tensor:
    """[P, T, n] class indices."""
    logits = (weights.flatten(1, 2) @ z.transpose(1, 2)).view(*weights.shape[:3], -1)
    return (logits + intercept[..., None]).argmax(dim=2)
