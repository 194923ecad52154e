"""The forward passes of a diagnosis: a short one over a few pictures for calibration, then one over all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keepsight.diagnosis.accumulate import Accumulator, Calibration
from keepsight.diagnosis.batches import Decoded, Loader
from keepsight.diagnosis.progress import tracked
from keepsight.vlm import Vlm, capture

SAMPLE = 4096  # tokens of the spectrum's sample, at least; twice the width if that is more


def measure(
    vlm: Vlm,
    loader: Loader,
    layers: Sequence[int],
    folder: Path,
    *,
    exact: bool = False,
    calibration_images: int | None = None,
    progress: bool = False,
) -> tuple[Accumulator, list[int]]:
    """The calibration pass and the main pass: the filled accumulator and the indices of the pictures it holds.

    Raises:
        ValueError: no picture could be read.
    """
    n = len(loader.pictures)
    size = min(n, calibration_images or min(32, max(8, n // 16)))
    order = np.random.default_rng([loader.seed, 5]).permutation(n)
    calibration, tokens, seen, start = Calibration(), 0, 0, 0
    while seen < size and start < n:  # once, unless pictures are broken: others take their place
        subset = np.sort(order[start : start + size - seen])
        start += len(subset)
        for decoded in loader.batches(subset.tolist(), masks=False):
            forward(vlm, decoded, layers, calibration.sink)
            tokens, seen = tokens + len(decoded.batch.image), seen + decoded.batch.n_images
    if not seen:
        raise ValueError(f"none of the {n} pictures can be read, such as '{loader.pictures[0].name}'; check the files")
    loader.rate = min(1.0, max(SAMPLE, 2 * vlm.width) / (n * tokens / seen))
    accumulator = Accumulator(layers, vlm.width, calibration.finish(), folder, exact)
    done: list[int] = []
    total = -(-n // loader.batch_size)
    for decoded in tracked(loader.batches(range(n), masks=True), "pictures", progress, total):
        accumulate(vlm, decoded, accumulator)
        done += decoded.indices
    return accumulator, done


def accumulate(vlm: Vlm, decoded: Decoded, accumulator: Accumulator) -> None:
    """One batch of the main pass."""
    accumulator.begin(decoded.batch.to(_device(vlm)))
    forward(vlm, decoded, accumulator.layers, accumulator.sink)
    accumulator.end()


def forward(vlm: Vlm, decoded: Decoded, layers: Sequence[int], sink: Any) -> None:
    """A forward without LM head and cache that hands each layer's visual tokens to `sink`."""
    device, dtype = _device(vlm), next(vlm.core.parameters()).dtype
    inputs = {
        name: value.to(device, dtype if value.is_floating_point() else None) if torch.is_tensor(value) else value
        for name, value in decoded.inputs.items()
    }
    with capture(vlm, layers, sink=sink):
        vlm.forward_core(**inputs)


def _device(vlm: Vlm) -> torch.device:
    return next(vlm.core.parameters()).device
