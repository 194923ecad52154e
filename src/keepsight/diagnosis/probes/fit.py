"""Fits of a probe: several layers together in memory, or one layer that is read from the disk block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from keepsight.diagnosis.probes.logistic import Solution, basis, solve, solve_streamed, streamed_basis

MEMORY = 16 << 20  # bytes that the layers fitted together on a CPU may take: about what its caches hold
FEATURES_MEMORY = 4 << 30  # bytes that the features of one layer may take in memory
STRENGTHS_MEMORY = 2 << 30  # bytes that the strengths of one layer fitted together may take
BLOCK = 256 << 20  # bytes that a block may take that is read from the disk

Fit = tuple[np.ndarray, np.ndarray, np.ndarray]  # accuracy in validation [P], strength [P], right in the test [P, n]


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


def bytes_together(n: int, d: int, classes: int, strengths: int) -> int:
    """What fitting one layer on n training pictures takes at most, with as many strengths together as are allowed."""
    blocks = streams(n, d)
    one = _bytes_per_strength(0 if blocks else n, d, classes)
    states = min(strengths, max(1, STRENGTHS_MEMORY // one)) * one
    return states + (48 * d * d + BLOCK if blocks else _bytes_of_features(n, d))


def bytes_per_layer(n: int, d: int, classes: int, strengths: int) -> int:
    """What fitting one layer in memory takes, all strengths together."""
    return _bytes_of_features(n, d) + strengths * _bytes_per_strength(n, d, classes)


def _bytes_of_features(n: int, d: int) -> int:
    width = min(n, d)
    return 4 * (3 * n * d + 2 * n * width + 3 * width * width)


def _bytes_per_strength(n: int, d: int, classes: int) -> int:
    """Logits of n pictures kept from step to step; parameters, gradients, and a history that is copied as it grows."""
    return 4 * (8 * n * classes + 24 * (min(n, d) if n else d) * classes)


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


def fit(x: Tensor, targets: Sequence[Tensor], split: Split, l2: Tensor, classes: int) -> list[Fit]:
    """A probe of each of P layers, for each of the targets; all data on one device.

    Args:
        x: [P, n, d] features.
        targets: class indices [n] to learn; the first are the true ones, which every test is scored by.
        l2: [R] strengths, of which validation chooses one.
    """
    z = standardise(x, split.train)
    del x
    known, train = basis(z[:, split.train]), split.train
    together = max(1, STRENGTHS_MEMORY // (len(z) * _bytes_per_strength(len(train), z.shape[2], classes)))

    def solved(target: Tensor, some: Tensor) -> Solution:
        return solve(z[:, train], target[train], some, classes, known=known)

    def predict(rows: np.ndarray, weights: Tensor, intercept: Tensor) -> Tensor:
        return _predict(z[:, rows], weights, intercept)

    return [_outcome(solved, predict, target, targets[0], split, l2, together) for target in targets]


def fit_streamed(x: Features, targets: Sequence[Tensor], split: Split, l2: Tensor, classes: int) -> list[Fit]:
    """The same for one layer whose features [n, d] never are in memory together."""
    d = x.shape[1]
    together = min(len(l2), max(1, STRENGTHS_MEMORY // _bytes_per_strength(0, d, classes)))
    size = max(1, BLOCK // (4 * (4 * d + 4 * together * classes)))

    def read(rows: np.ndarray) -> Iterator[tuple[Tensor, np.ndarray]]:
        for part in np.array_split(rows, -(-len(rows) // size)):
            yield torch.as_tensor(x[part]).to(l2.device), part

    mean, scale = _scale(*_moments(block for block, _ in read(split.train)))

    def blocks(target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for block, part in read(split.train):
            yield (block - mean) * scale, target[part]

    known = streamed_basis(partial(blocks, targets[0]))

    def solved(target: Tensor, some: Tensor) -> Solution:
        return solve_streamed(partial(blocks, target), some, classes, known=known)

    def predict(rows: np.ndarray, weights: Tensor, intercept: Tensor) -> Tensor:
        found = [_predict(((block - mean) * scale)[None], weights, intercept) for block, _ in read(rows)]
        return torch.cat(found, dim=2)

    return [_outcome(solved, predict, target, targets[0], split, l2, together) for target in targets]


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


def _outcome(
    solved: Callable[[Tensor, Tensor], Solution],
    predict: Callable[[np.ndarray, Tensor, Tensor], Tensor],
    target: Tensor,
    truth: Tensor,
    split: Split,
    l2: Tensor,
    together: int,
) -> Fit:
    """Validation accuracy and strength of the best fit, and whether its test answers are right.

    together: strengths solved at a time.
    """
    parts = [solved(target, some) for some in l2.split(together)]
    weights, intercept = (
        torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("weights", "intercept")
    )
    guess = predict(split.validation, weights, intercept)  # [P, R, n]
    accuracy = (guess == target[split.validation]).double().mean(dim=2)
    # Of equally good strengths, the strongest: the simpler classifier.
    chosen = len(l2) - 1 - accuracy.flip(1).argmax(dim=1)
    layer = torch.arange(len(weights), device=weights.device)
    answers = predict(split.test, weights[layer, chosen][:, None], intercept[layer, chosen][:, None])[:, 0]
    right = answers == truth[split.test]
    return accuracy[layer, chosen].cpu().numpy(), l2[chosen].cpu().numpy(), right.cpu().numpy()


def _predict(z: Tensor, weights: Tensor, intercept: Tensor) -> Tensor:
    """[P, R, n] class indices."""
    return (z[:, None] @ weights + intercept[:, :, None]).argmax(dim=-1)
