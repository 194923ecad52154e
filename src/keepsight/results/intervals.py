"""95 % intervals: of a mean, and of the difference of two numbers that were measured on the same pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import stdtrit
from scipy.stats import bootstrap

from keepsight.results.measurement import Measurement
from keepsight.results.per_image import PerImage

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval (None where it cannot be had)."""

    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""

    @property
    def fields(self) -> dict[str, Any]:
        """What a `Measurement` takes."""
        return {"value": self.value, "low": self.low, "high": self.high}

    @property
    def told(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean_interval(values: np.ndarray) -> Estimate:
    """Mean and 95 % t-interval of one value per image; NaN are images without a value."""
    values = values[~np.isnan(values)].astype(np.float64)
    if not len(values):
        return Estimate(None, note="no image has a value")
    mean = float(values.mean())
    if len(values) == 1:
        return Estimate(mean, note="no interval: one value")
    half = float(stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / math.sqrt(len(values)))
    return Estimate(mean, mean - half, mean + half)


def ratio_shares(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """[n], what each image adds to Σ above / Σ below (its linearisation); images with a NaN in one have one here."""
    defined = ~np.isnan(above) & ~np.isnan(below)
    above, below = (np.where(defined, part, np.nan).astype(np.float64) for part in (above, below))
    if not np.nansum(below) > 0:
        return np.full(len(above), np.nan)
    ratio = np.nansum(above) / np.nansum(below)
    return ratio + (above - ratio * below) / np.nanmean(below)


def ratio_interval(above: np.ndarray, below: np.ndarray) -> Estimate:
    """Σ above / Σ below over images, with a linearised 95 % t-interval."""
    shares = ratio_shares(above, below)
    if np.isnan(shares).all():
        return Estimate(None, note="the ratio's denominator is zero")
    defined = ~np.isnan(shares)
    ratio = float(above[defined].sum(dtype=np.float64) / below[defined].sum(dtype=np.float64))
    return replace(mean_interval(shares), value=ratio)


def bootstrap_ratio(above: np.ndarray, below: np.ndarray, seed: int = 0) -> Estimate:
    """Σ above / Σ below over clusters, with a 95 % percentile bootstrap interval (Efron 1979) over them.

    Args:
        above, below: [n], what each cluster adds; with a cluster's sum of scores and its number of questions, the mean
            score. below > 0.

    Returns:
        No interval where every cluster has the same ratio: the bootstrap would claim certainty.
    """
    value = float(above.sum() / below.sum())
    if len(above) == 1 or np.ptp(above / below) == 0:
        why = "one cluster" if len(above) == 1 else "all clusters agree"
        return Estimate(value, note=f"no interval: {why}")
    found = bootstrap(
        (above, below),
        lambda a, b, axis: a.sum(axis=axis) / b.sum(axis=axis),
        n_resamples=RESAMPLES,
        batch=max(1, 2**21 // len(above)),  # memory
        paired=True,
        vectorized=True,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(value, float(found.low), float(found.high))


def difference(before: Measurement, after: Measurement, correlation: float = 0.0) -> Estimate:
    """after − before with a 95 % interval from the two intervals (Zou and Donner 2008, "square and add").

    Args:
        correlation: of the two estimates, see `correlation`. 0 treats them as independent; measured on the same
            pictures they rarely are, and the interval is then wider than it need be. Two means with t-intervals and
            their correlation give the paired t-interval exactly, two Wilson intervals that of Newcombe (1998).

    Returns:
        No value where one is missing; no interval where one of the two has none.
    """
    if before.value is None or after.value is None:
        return Estimate(None, note=before.note if before.value is None else after.note)
    value = after.value - before.value
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return Estimate(value)
    below = _leg(after.value - after.low, before.high - before.value, correlation)
    above = _leg(after.high - after.value, before.value - before.low, correlation)
    return Estimate(value, value - below, value + above)


def _leg(a: float, b: float, correlation: float) -> float:
    return math.sqrt(max(0.0, a * a + b * b - 2 * correlation * a * b))


def correlation(before: Measurement, after: Measurement, first: PerImage | None, second: PerImage | None) -> float:
    """Correlation of two numbers as estimates, from what each picture adds to them.

    Pictures that only one of them has count as independent: with none in common, or nothing kept by picture, it is 0.
    """
    if first is None or second is None or before.key not in first or after.key not in second:
        return 0.0
    x, y = first.of(before.key), second.of(after.key)
    x, y = x - _mean(x), y - _mean(y)
    mine, theirs = first.together(second)
    shared = np.nansum(x[mine] * y[theirs])
    spread = math.sqrt(np.nansum(x * x) * np.nansum(y * y))
    return float(np.clip(shared / spread, -1.0, 1.0)) if spread > 0 else 0.0


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if not np.isnan(values).all() else 0.0
