"""The forward passes of a diagnosis: a short one over a few pictures for calibration, then one over all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keepsight.diagnosis.accumulate import Accumulator
from keepsight.diagnosis.batches import Decoded, Loader
from keepsight.diagnosis.calibrate import Calibration
from keepsight.diagnosis.progress import tracked
from keepsight.vlm import Vlm, capture
from keepsight.vlm.features import ProjectorInput

COUNTED = 256  # images whose patches' neighbours are counted: beyond them, it would cost as much as a few layers
SAMPLE = 4096  # tokens of the sample, at least; twice the width if that is more


def measure(
    vlm: Vlm,
    loader: Loader,
    layers: Sequence[int],
    folder: Path,
    *,
    exact: bool = False,
    calibration_images: int | None = None,
    encoder: bool = False,
    bleeding: bool = False,
    progress: bool = False,
) -> tuple[Accumulator, list[int]]:
    """The calibration pass and the main pass: the filled accumulator and the indices of the pictures it holds.

    Args:
        exact: sample every token.
        encoder: also keep the vision encoder's output at the sampled tokens. bleeding: also count neighbours.

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
    loader.rate = 1.0 if exact else min(1.0, max(SAMPLE, 2 * vlm.width) / (n * tokens / seen))
    loader.counted = COUNTED / n  # of one or more, all
    accumulator = Accumulator(layers, vlm.width, calibration.finish(), folder, exact, bleeding)
    done: list[int] = []
    total = -(-n // loader.batch_size)
    with _projector_input(vlm, accumulator, encoder) as given:
        for decoded in tracked(loader.batches(range(n), masks=True), "pictures", progress, total):
            accumulate(vlm, decoded, accumulator, given)
            done += decoded.indices
    return accumulator, done


def accumulate(vlm: Vlm, decoded: Decoded, accumulator: Accumulator, given: ProjectorInput | None = None) -> None:
    """One batch of the main pass; `given`: where the vision encoder's output is found, if it is wanted."""
    accumulator.begin(decoded.batch.to(_device(vlm)))
    inputs = forward(vlm, decoded, accumulator.layers, accumulator.sink)
    if given is not None and not accumulator.no_encoder:
        try:
            accumulator.take_encoder(given.on_tokens(decoded.tokens, inputs))
        except ValueError as error:  # a family whose patches have no tokens; found at the first batch
            if accumulator.encoder is not None:
                raise
            accumulator.no_encoder = _reason(error)
    accumulator.end()


@contextmanager
def _projector_input(vlm: Vlm, accumulator: Accumulator, wanted: bool) -> Iterator[ProjectorInput | None]:
    """What the projector is given, or None with the reason in the accumulator."""
    given = None
    if wanted:
        try:
            given, accumulator.no_encoder = ProjectorInput(vlm), ""
        except ValueError as error:
            accumulator.no_encoder = _reason(error)
    try:
        yield given
    finally:
        if given is not None:
            given.hook.remove()


def _reason(error: ValueError) -> str:
    return str(error).partition("; use the anchor")[0]  # advice for training


def forward(vlm: Vlm, decoded: Decoded, layers: Sequence[int], sink: Any) -> dict[str, Any]:
    """A forward without LM head and cache that hands each layer's visual tokens to `sink`; returns its inputs."""
    inputs = on_device(vlm, decoded)
    with capture(vlm, layers, sink=sink):
        vlm.forward_core(**inputs)
    return inputs


def on_device(vlm: Vlm, decoded: Decoded) -> dict[str, Any]:
    """The model's inputs where it is, in its dtype."""
    device, dtype = _device(vlm), next(vlm.core.parameters()).dtype
    return {
        name: value.to(device, dtype if value.is_floating_point() else None) if torch.is_tensor(value) else value
        for name, value in decoded.inputs.items()
    }


def _device(vlm: Vlm) -> torch.device:
    return next(vlm.core.parameters()).device
