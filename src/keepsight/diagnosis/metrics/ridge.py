"""Ridge regressions of several targets on the same features, from sums over tokens that are read in blocks.

Features and targets are standardised by the training tokens; channels that do not vary there are left out. Arithmetic
is float64. Strengths are relative: with X standardised, tr(XᵀX)/d is the number n of training tokens, and λ = α·n.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

STRENGTHS = tuple(10.0**k for k in range(-6, 2))  # α; λ = α · tr(XᵀX)/d
CHOOSING = 32  # directions of a target that α is chosen on
TRAIN, VALIDATION, TEST, UNUSED = range(4)

Blocks = Callable[[], Iterable[tuple[np.ndarray, Tensor]]]


@dataclass(frozen=True)
class Scale:
    """mean, factor: [d]; factor is 1/deviation, 0 for a constant channel."""

    mean: Tensor
    factor: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean).mul_(self.factor)  # the mean's float64 makes the difference float64, without a copy

    def __getitem__(self, channels: slice) -> Scale:
        return Scale(self.mean[channels], self.factor[channels])

    @property
    def constant(self) -> int:
        """Channels left out."""
        return int((self.factor == 0).sum())


class Moments:
    """Sums and sums of squares over tokens [rows, d], less the first block's mean so that float64 loses nothing."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, x: Tensor) -> Tensor:
        """Add a block that is not empty; returns it shifted, float64."""
        if not self.count:
            self.shift = x.mean(dim=0, dtype=torch.float64)
            self.first, self.squares = torch.zeros_like(self.shift), torch.zeros_like(self.shift)
        z = x - self.shift
        self.count += len(z)
        self.first += z.sum(dim=0)
        self.squares += torch.linalg.vector_norm(z, dim=0).square()
        return z

    def scale(self) -> Scale:
        mean = self.first / self.count
        deviation = (self.squares / self.count - mean.square()).clamp(min=0).sqrt()
        # A deviation at the level of float32 rounding is a constant channel, not information.
        constant = deviation <= 1e-6 * (mean + self.shift).abs() + 1e-30
        return Scale(mean + self.shift, torch.where(constant, 0.0, 1 / deviation.clamp(min=1e-30)))


@dataclass(frozen=True)
class Score:
    """How one target was predicted on the test tokens.

    strength: α; images: [n_images], those with test tokens; error, spread: [n_images] sums of squared errors and of
    squared deviations from the training mean, over each image's test tokens; cosine: [n_images] mean cosine of
    prediction and target, NaN where all are zero; constant: the target's channels left out.
    """

    strength: float
    images: np.ndarray
    error: np.ndarray
    spread: np.ndarray
    cosine: np.ndarray
    constant: int


@dataclass(frozen=True)
class Fit:
    """scores: of each target; train, test: tokens; constant: features left out."""

    scores: dict[str, Score]
    train: int
    test: int
    constant: int


def fit_ridge(
    blocks: Blocks,
    targets: Mapping[str, Callable[[np.ndarray], Tensor]],
    part: np.ndarray,
    image: np.ndarray,
    *,
    seed: int = 0,
    strengths: Sequence[float] = STRENGTHS,
) -> Fit:
    """One ridge regression a target: trained on the training tokens, α by validation, scored once on the test tokens.

    Args:
        blocks: gives all tokens each time it is called, as (their numbers, features [rows, d]).
        targets: for each, a function from tokens' numbers to [rows, m].
        part: [n], TRAIN, VALIDATION, TEST or UNUSED of each token; image: [n], the image of each.
        seed: of the directions that α is chosen on, where a target has more than `CHOOSING` channels.
        strengths: values of α. Objective: ‖Y − XW‖² + α·n·‖W‖², n training tokens, both standardised.

    Raises:
        ValueError: a part is empty.
    """
    names, moments, second, widths = list(targets), Moments(), None, [0]

    def parts_of(rows: np.ndarray, x: Tensor) -> list[Tensor]:
        """Features and all targets, to be put side by side: one product of matrices is cheaper than one for each."""
        return [x, *(read(rows) for read in targets.values())]

    for rows, x in _only(blocks, part, TRAIN):
        parts = parts_of(rows, x)
        widths = [one.shape[1] for one in parts]
        z = moments.add(torch.cat(parts, dim=1))
        product = z[:, : widths[0]].T @ z
        second = product if second is None else second.add_(product)
    if second is None or not (part == VALIDATION).any() or not (part == TEST).any():
        raise ValueError("ridge regression needs training, validation and test tokens; one of the parts is empty")
    scale, d = moments.scale(), widths[0]
    ends = np.cumsum(widths).tolist()
    columns = {name: slice(start, end) for name, start, end in zip(names, ends, ends[1:], strict=False)}
    first = moments.first / moments.count
    second = (second / moments.count).addr_(first[:d], first, alpha=-1)
    second *= scale.factor[:d, None] * scale.factor  # mean products of standardised features with both, [d, d + …]
    correlation, products = second[:, :d], {name: second[:, columns[name]] for name in names}
    some = {name: directions(product.shape[1], CHOOSING, seed).to(product) for name, product in products.items()}
    reduced = torch.cat([products[name] @ some[name] for name in names], dim=1)
    # A few Cholesky factors cost a fraction of one eigendecomposition.
    maps = torch.cat([torch.cholesky_solve(reduced, _factor(correlation, alpha)) for alpha in strengths], dim=1)
    errors = torch.zeros(len(strengths), reduced.shape[1], dtype=torch.float64, device=reduced.device)
    for rows, x in _only(blocks, part, VALIDATION):
        z = scale(torch.cat(parts_of(rows, x), dim=1))
        y = torch.cat([z[:, columns[name]] @ some[name] for name in names], dim=1)
        missed = (z[:, :d] @ maps).view(len(z), *errors.shape).sub_(y[:, None])
        errors += torch.linalg.vector_norm(missed, dim=0).square()
    sizes = [some[name].shape[1] for name in names]
    # Of equally good strengths, the strongest: the simpler map.
    chosen = {
        name: len(strengths) - 1 - int(error.sum(dim=1).flip(0).argmin())
        for name, error in zip(names, errors.split(sizes, dim=1), strict=True)
    }
    factors = {a: _factor(correlation, strengths[a]) for a in set(chosen.values())}
    final = torch.cat([torch.cholesky_solve(products[name], factors[chosen[name]]) for name in names], dim=1)
    del factors, correlation, maps

    images = int(image.max()) + 1
    tables = {name: np.zeros((4, images)) for name in names}
    for rows, x in _only(blocks, part, TEST):
        z, owner = scale(torch.cat(parts_of(rows, x), dim=1)), image[rows]
        predictions = (z[:, :d] @ final).split(widths[1:], dim=1)
        for name, prediction in zip(names, predictions, strict=True):
            tables[name] += per_image(prediction, z[:, columns[name]], owner, images)
    tested = np.unique(image[part == TEST])
    scores = {
        name: score_of(float(strengths[chosen[name]]), table, tested, scale[columns[name]].constant)
        for name, table in tables.items()
    }
    return Fit(scores, moments.count, int((part == TEST).sum()), scale[:d].constant)


def _factor(correlation: Tensor, alpha: float) -> Tensor:
    """Cholesky factor [d, d] of the correlation matrix with α on its diagonal."""
    regularised = correlation.clone()
    regularised.diagonal().add_(alpha)
    return torch.linalg.cholesky(regularised)


def per_image(prediction: Tensor, truth: Tensor, owner: np.ndarray, images: int) -> np.ndarray:
    """[4, images] sums over tokens: squared error, squared truth, cosine, and the number of cosines."""
    length = torch.linalg.vector_norm(prediction, dim=1) * torch.linalg.vector_norm(truth, dim=1)
    cosine = (prediction * truth).sum(dim=1) / length  # NaN for a zero vector
    defined = length > 0
    columns = [
        (prediction - truth).square().sum(dim=1),
        truth.square().sum(dim=1),
        torch.where(defined, cosine, 0.0),
        defined.double(),
    ]
    return np.stack([np.bincount(owner, column.cpu().numpy(), minlength=images) for column in columns])


def score_of(strength: float, table: np.ndarray, images: np.ndarray, constant: int) -> Score:
    """From the sums of `per_image`, of these images."""
    table = table[:, images]
    with np.errstate(invalid="ignore", divide="ignore"):
        return Score(strength, images, table[0], table[1], table[2] / table[3], constant)


def _only(blocks: Blocks, part: np.ndarray, wanted: int) -> Iterable[tuple[np.ndarray, Tensor]]:
    for rows, x in blocks():
        chosen = part[rows] == wanted
        if chosen.any():
            yield rows[chosen], x[torch.from_numpy(chosen).to(x.device)]


@lru_cache(maxsize=8)
def directions(width: int, count: int, seed: int) -> Tensor:
    """[width, count] float64, orthonormal and seeded; the identity where there are no more channels than that."""
    if width <= count:
        return torch.eye(width, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, count, generator=generator, dtype=torch.float64))[0]
