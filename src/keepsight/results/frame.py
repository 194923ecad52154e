"""Rows as a pandas DataFrame."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

from keepsight.results.measurement import Measurement

if TYPE_CHECKING:
    from pandas import DataFrame


def frame(rows: Iterable[Measurement]) -> DataFrame:
    """One line a row, one column a field of `Measurement`; what is not known is missing (`layer`, `n`, `seed`: Int64).

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as cause:
        raise ImportError('a frame needs pandas; it is not installed: pip install "keepsight[figures]"') from cause
    found = pd.DataFrame([asdict(row) for row in rows], columns=[field.name for field in fields(Measurement)])
    numbers = dict.fromkeys(("value", "low", "high"), "float64") | dict.fromkeys(("layer", "n", "seed"), "Int64")
    return found.astype(numbers)
