"""Spectrum: over how many directions do the visual tokens of a layer spread, and how correlated are its channels?

The claim is the paper's (in the middle layers the effective dimension peaks and feature correlation is lowest); the
definitions are ours, see docs/metrics.md. Covariances are summed in a stream: float32 products of a chunk of shifted
tokens, float64 sums. The sums are kept for a few groups of images, so that a delete-one-group jackknife
gives intervals whose clusters are images.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence

import torch
from scipy.special import stdtrit
from torch import Tensor

from keepsight.results.intervals import Estimate

GROUPS = 10  # jackknife groups of images
SHARES = (0.90, 0.95, 0.99)
CHUNK = 1024  # tokens a float32 product may sum over
BLOCKS = 4  # of rows that a symmetric matrix is computed in: 10 of 16 blocks, the others are their mirror image
DEAD = 1e-12  # a channel with less than this share of the mean channel variance counts as constant


def _row_blocks(d: int) -> Iterator[tuple[int, int]]:
    step = max(1, -(-d // BLOCKS))
    return ((start, min(start + step, d)) for start in range(0, d, step))


def along(matrix: Tensor, vectors: Tensor) -> Tensor:
    """vᵀ M v for each column v of vectors [d, k] and the symmetric M [d, d], of which the lower blocks are enough."""
    found = vectors.new_zeros(vectors.shape[1])
    for start, stop in _row_blocks(len(matrix)):
        rows, own = matrix[start:stop], vectors[start:stop]
        part = rows[:, start:stop] @ own
        if start:
            part.addmm_(rows[:, :start], vectors[:start], alpha=2)
        found += (part * own).sum(dim=0)
    return found


class CovarianceSums:
    """Streaming sums of tokens and of their products, one set for each of G groups of images.

    Of the products only the lower block triangle is summed and kept.

    Args:
        width: d.
        groups: G.
        shift: [d], a value near the mean; it is taken off before the float32 products, which would otherwise lose
            the variance beside a large common direction.
    """

    def __init__(self, width: int, groups: int = GROUPS, shift: Tensor | None = None, device: str = "cpu") -> None:
        self.shift = torch.zeros(width, device=device) if shift is None else shift.float().to(device)
        self._channels: Tensor | None = None
        self.count = torch.zeros(groups, dtype=torch.float64, device=device)
        self.first = torch.zeros(groups, width, dtype=torch.float64, device=device)
        # One tensor for each block of rows, up to the diagonal block. Only intervals are made of the groups' own, and
        # at 4,096 channels ten of them in float64 would take 0.8 GB.
        blocks = [(high - low, high) for low, high in _row_blocks(width)]
        self._second = [torch.zeros(block, dtype=torch.float64, device=device) for block in blocks]
        self._second_of = [torch.zeros(groups, *block, device=device) for block in blocks]

    def update(self, tokens: Tensor, group: int) -> None:
        """Add the tokens [t, d] of one group of images."""
        for start in range(0, tokens.shape[0], CHUNK):
            z = tokens[start : start + CHUNK].float() - self.shift
            for (low, high), total, own in zip(_row_blocks(z.shape[1]), self._second, self._second_of, strict=True):
                product = z[:, low:high].T @ z[:, :high]
                total.add_(product)
                own[group].add_(product)
            self.first[group].add_(z.sum(dim=0))
            self.count[group] += z.shape[0]

    @property
    def n(self) -> int:
        """Tokens seen."""
        return int(self.count.sum())

    def select(self, channels: Tensor) -> CovarianceSums:
        """The sums over these channels only (channels: bool [d]), as a view: tokens that are added count in both."""
        chosen = copy.copy(self)
        chosen._channels = channels
        chosen.shift = self.shift[channels]
        return chosen

    def total(self) -> tuple[Tensor, Tensor, Tensor]:
        """Count, sum of tokens [d] and sum of products [d, d] over all groups."""
        return self.count.sum(), *self._chosen(self.first.sum(dim=0), self._second)

    def group(self, g: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same of one group."""
        return self.count[g], *self._chosen(self.first[g], [block[g] for block in self._second_of])

    def _chosen(self, first: Tensor, blocks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        second = blocks[0].new_empty(len(first), len(first))
        for (low, high), block in zip(_row_blocks(len(first)), blocks, strict=True):
            second[low:high, :high] = block
            second[:low, low:high] = block[:, :low].T
        if self._channels is None:
            return first, second
        return first[self._channels], second[self._channels][:, self._channels]


def covariance_of(count: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """[d, d] float64 population covariance from sums."""
    mean = first / count
    return (second / count).addr_(mean, mean, alpha=-1)


def channel_norms(sums: CovarianceSums) -> Tensor:
    """[d] float64, root mean square of each channel, its mean included."""
    count, first, second = sums.total()
    mean, shift = first / count, sums.shift.double()
    return (second.diagonal() / count + 2 * shift * mean + shift * shift).clamp(min=0).sqrt()


def correlation(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Pearson correlation of the channels that vary: ([c, c], live [d] bool)."""
    variance = covariance.diagonal()
    live = variance > DEAD * variance.mean()
    deviation = variance[live].sqrt()
    return covariance[live][:, live] / (deviation[:, None] * deviation[None, :]), live


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [d] float64 and eigenvectors [d, d] float32 of a symmetric float64 matrix [d, d].

    In little more than half the time of a float64 decomposition: the eigenvalues are v_iᵀ C v_i / |v_i|² in float64,
    which is off by the square of what the float32 vectors are off.
    """
    vectors = torch.linalg.eigh(matrix.float()).eigenvectors
    exact = vectors.double()
    return along(matrix, exact) / exact.square().sum(dim=0), vectors


def participation_ratio(matrix: Tensor) -> float:
    """(Σλ)² / Σλ² of a symmetric matrix, from its trace and its norm alone: 1 … d."""
    return float(matrix.trace() ** 2 / (matrix * matrix).sum())


def entropy_rank(eigenvalues: Tensor) -> Tensor:
    """exp of the entropy of λ / Σλ: [..., d] → [...], 1 … d."""
    positive = eigenvalues.clamp(min=0)
    return torch.special.entr(positive / positive.sum(dim=-1, keepdim=True)).sum(dim=-1).exp()


def components(eigenvalues: Tensor, shares: Sequence[float], fractional: bool = False) -> Tensor:
    """Principal components that hold each share of the variance: [..., d] → [..., S].

    `fractional` interpolates inside the last component.
    """
    ordered = eigenvalues.clamp(min=0).sort(dim=-1, descending=True).values
    cumulative = ordered.cumsum(dim=-1) / ordered.sum(dim=-1, keepdim=True)
    wanted = torch.tensor(list(shares), dtype=cumulative.dtype, device=cumulative.device).expand(
        *cumulative.shape[:-1], len(shares)
    )
    # A spectrum that reaches the share exactly must not need one more component for a rounding error.
    whole = torch.searchsorted(cumulative, (wanted - 1e-9).contiguous())
    if not fractional:
        return (whole + 1).to(cumulative.dtype)
    before = torch.where(whole > 0, cumulative.gather(-1, (whole - 1).clamp(min=0)), 0.0)
    return whole + (wanted - before) / (cumulative.gather(-1, whole) - before).clamp(min=1e-300)


def feature_correlation(matrix: Tensor) -> float:
    """Mean |off-diagonal| of a correlation matrix [c, c]."""
    c = matrix.shape[0]
    return float((matrix.abs().sum() - matrix.diagonal().abs().sum()) / (c * (c - 1)))


def jackknife(value: float, without: list[float], sizes: list[float], log: bool) -> tuple[float, float] | None:
    """95 % interval by the delete-one-group jackknife for groups of unequal size, Student's t with G − 1.

    Args:
        without: the statistic with each group left out; sizes: the groups' sizes (n_g of n = Σ n_g).
        log: on the log scale, for quantities above zero whose error grows with their size.
    """
    if len(without) < 2:
        return None
    scale = math.log if log else float
    centre, n, groups = scale(value), sum(sizes), len(sizes)
    pseudo = [(n / m) * centre - (n / m - 1) * scale(other) for other, m in zip(without, sizes, strict=True)]
    mean = sum(pseudo) / groups
    variance = sum((p - mean) ** 2 / (n / m - 1) for p, m in zip(pseudo, sizes, strict=True)) / groups
    half = float(stdtrit(groups - 1, 0.975)) * math.sqrt(variance)
    if log:
        return value * math.exp(-half), value * math.exp(half)
    return value - half, value + half


def spectrum(sums: CovarianceSums) -> dict[tuple[str, str], Estimate]:
    """All second-order numbers of one layer: {(metric, variant): estimate}.

    Metrics participation_ratio, entropy_rank, components_90/95/99 on variants "covariance" and "correlation", and
    feature_correlation (variant ""). Jackknife values of the participation ratio and of the feature correlation are
    exact; those of the eigenvalue metrics use the first-order eigenvalues v_iᵀ C v_i, v_i the eigenvectors of the
    full matrix, so that one decomposition serves all groups.
    """
    names = ["participation_ratio", "entropy_rank", *(f"components_{round(100 * s)}" for s in SHARES)]
    total = sums.total()
    covariance = covariance_of(*total) if sums.n >= 2 else None
    if covariance is None or float(covariance.trace()) <= 0:
        why = f"{sums.n} tokens" if sums.n < 2 else "the tokens of this layer do not vary"
        missing = Estimate(None, note=why)
        return {
            **{(name, variant): missing for variant in ("covariance", "correlation") for name in names},
            ("feature_correlation", ""): missing,
        }
    pearson, live = correlation(covariance)
    dead = int((~live).sum())
    note = f"{dead} constant channels left out" if dead else ""
    present = [g for g in range(sums.count.shape[0]) if 0 < sums.count[g] < sums.n - 1]
    sizes = [float(sums.count[g]) for g in present]

    full = {"covariance": covariance, "correlation": pearson}
    basis = {variant: eigen(matrix) for variant, matrix in full.items()}
    without: dict[tuple[str, str], list[float]] = {}
    spectra: dict[str, list[Tensor]] = {variant: [] for variant in full}
    directions = {variant: vectors for variant, (_, vectors) in basis.items()}
    if dead:
        directions["correlation"] = pearson.new_zeros(len(live), len(pearson), dtype=torch.float32)
        directions["correlation"][live] = basis["correlation"][1]
    ones, c = covariance.new_ones(len(live), 1), len(pearson)
    for g in present:
        part = covariance_of(*(all_ - own for all_, own in zip(total, sums.group(g), strict=True)))
        variance = part.diagonal().clamp(min=0)
        # 1/deviation, with which the covariance says of the correlation what is needed, without its being formed
        scale = torch.where(live & (variance > 0), variance.rsqrt(), 0.0)[:, None]
        rounded = part.float()
        for variant, vectors in directions.items():
            turned = vectors if variant == "covariance" else vectors * scale.float()
            spectra[variant].append(along(rounded, turned).double())
        squares, correlated = part * part, float(variance @ scale[:, 0].square())
        without.setdefault((names[0], "covariance"), []).append(float(variance.sum() ** 2 / along(squares, ones)))
        without.setdefault((names[0], "correlation"), []).append(correlated**2 / float(along(squares, scale.square())))
        if c > 1:
            off = (float(along(part.abs_(), scale)) - correlated) / (c * (c - 1))
            without.setdefault(("feature_correlation", ""), []).append(off)

    found: dict[tuple[str, str], Estimate] = {}
    for variant, matrix in full.items():
        eigenvalues = basis[variant][0]
        values = [participation_ratio(matrix), float(entropy_rank(eigenvalues))]
        smooth = [*values, *components(eigenvalues, SHARES, fractional=True).tolist()]
        values += components(eigenvalues, SHARES).tolist()
        if present:
            groups = torch.stack(spectra[variant])
            without[names[1], variant] = entropy_rank(groups).tolist()
            shares = components(groups, SHARES, fractional=True)
            without |= {(name, variant): column.tolist() for name, column in zip(names[2:], shares.T, strict=True)}
        for name, value, centre in zip(names, values, smooth, strict=True):
            found[name, variant] = _with_interval(value, centre, without.get((name, variant), []), sizes, True, note)
    if pearson.shape[0] > 1:
        value = feature_correlation(pearson)
        others = without.get(("feature_correlation", ""), [])
        found["feature_correlation", ""] = _with_interval(value, value, others, sizes, False, note)
    else:
        found["feature_correlation", ""] = Estimate(None, note="fewer than two channels vary")
    return found


def _with_interval(
    value: float, smooth: float, without: list[float], sizes: list[float], log: bool, note: str
) -> Estimate:
    """`smooth` is the statistic that the jackknife values are of; its interval is moved to `value`."""
    interval = jackknife(smooth, without, sizes, log)
    if interval is None:
        return Estimate(value, note="; ".join(filter(None, [note, "no interval: one group of images"])))
    return Estimate(value, interval[0] + value - smooth, interval[1] + value - smooth, note)
