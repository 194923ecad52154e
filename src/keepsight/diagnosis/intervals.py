"""Means and ratios over images with 95 % intervals: images are the clusters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit


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


def mean_interval(values: np.ndarray) -> Estimate:
    """Mean and 95 % t-interval of one value per image; NaN are images without a value."""
    values = values[~np.isnan(values)].astype(np.float64)
    if not len(values):
        return Estimate(None, note="no image has a value")
    mean = float(values.mean())
    if len(values) == 1:
        return Estimate(mean, note="no interval: one image")
    half = float(stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / math.sqrt(len(values)))
    return Estimate(mean, mean - half, mean + half)


def ratio_interval(above: np.ndarray, below: np.ndarray) -> Estimate:
    """Σ above / Σ below over images, with a linearised 95 % t-interval."""
    above, below = above.astype(np.float64), below.astype(np.float64)
    if not below.sum() > 0:
        return Estimate(None, note="the ratio's denominator is zero")
    ratio = float(above.sum() / below.sum())
    spread = mean_interval((above - ratio * below) / below.mean())
    if spread.low is None or spread.high is None:
        return Estimate(ratio, note=spread.note)
    return Estimate(ratio, ratio + spread.low, ratio + spread.high)
