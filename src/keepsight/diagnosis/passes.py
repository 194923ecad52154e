"""The forward passes of a diagnosis: a short one over a few pictures for calibration, then one over all."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keepsight.diagnosis.accumulate import Accumulator
from keepsight.diagnosis.batches import Decoded, Loader
from keepsight.diagnosis.calibrate import Calibration
from keepsight.diagnosis.progress import tracked
from keepsight.vlm import Vlm, capture
from keepsight.vlm.features import ProjectorInput, image_features

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
    encoder: Vlm | None = None,
    bleeding: bool = False,
    progress: bool = False,
) -> tuple[Accumulator, list[int]]:
    """The calibration pass and the main pass: the filled accumulator and the indices of the pictures it holds.

    Args:
        exact: sample every token.
        encoder: the model whose vision encoder's output is kept at the sampled tokens: this one, or another checkpoint.
        bleeding: also count neighbours.

    Raises:
        ValueError: no picture could be read, or the temporary folder has no room for all tokens (`exact`).
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
    if exact:
        _check_room(folder, 4 * len(layers) * vlm.width * n * tokens // seen)
    accumulator = Accumulator(layers, vlm.width, calibration.finish(), folder, exact, bleeding)
    done: list[int] = []
    total = -(-n // loader.batch_size)
    source = None if encoder is None else EncoderOutput(encoder, vlm)
    try:
        for decoded in tracked(loader.batches(range(n), masks=True), "pictures", progress, total):
            accumulate(vlm, decoded, accumulator, source)
            done += decoded.indices
    finally:
        if source is not None:
            source.remove()
    return accumulator, done


def accumulate(vlm: Vlm, decoded: Decoded, accumulator: Accumulator, source: EncoderOutput | None = None) -> None:
    """One batch of the main pass; `source`: where the vision encoder's output comes from, if it is wanted."""
    accumulator.begin(decoded.batch.to(_device(vlm)))
    forward(vlm, decoded, accumulator.layers, accumulator.sink)
    if source is not None:
        source.keep(decoded, accumulator)
    accumulator.end()


class EncoderOutput:
    """The vision encoder's output on the visual tokens of each batch, of the diagnosed model or of another checkpoint.

    Args:
        encoder: the model whose encoder is asked. vlm: the diagnosed one, whose forward has run.
    """

    def __init__(self, encoder: Vlm, vlm: Vlm) -> None:
        self.encoder = encoder
        self._runs = encoder is vlm
        self._why = ""
        self._given: ProjectorInput | None = None
        try:
            self._given = ProjectorInput(encoder)
        except ValueError as error:
            self._why = _reason(error)

    def keep(self, decoded: Decoded, accumulator: Accumulator) -> None:
        """Hand the present batch's output to the accumulator, or once and for all the reason why there is none."""
        if self._given is not None:
            inputs = on_device(self.encoder, decoded)
            if not self._runs:
                image_features(self.encoder, inputs)
            try:
                features = self._given.on_tokens(decoded.tokens, inputs)
                accumulator.take_encoder(features.to(accumulator.device))
                return
            except ValueError as error:  # a family whose patches have no tokens; found at the first batch
                if accumulator.encoder is not None:
                    raise
                self._why = _reason(error)
                self.remove()
        accumulator.no_encoder = self._why

    def remove(self) -> None:
        """Take the hook off."""
        if self._given is not None:
            self._given.hook.remove()
            self._given = None


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"exact=True keeps all tokens in '{folder.parent}', about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB "
            "are free there; leave it out, or set TMPDIR to a folder on a larger disk"
        )


def _reason(error: ValueError) -> str:
    return str(error).partition("; use the anchor")[0]  # advice for training


def forward(vlm: Vlm, decoded: Decoded, layers: Sequence[int], sink: Any) -> None:
    """A forward without LM head and cache that hands each layer's visual tokens to `sink`."""
    with capture(vlm, layers, sink=sink):
        vlm.forward_core(**on_device(vlm, decoded))


def on_device(vlm: Vlm, decoded: Decoded) -> dict[str, Any]:
    """The model's inputs where it is, in its dtype."""
    device, dtype = _device(vlm), next(vlm.core.parameters()).dtype
    return {
        name: value.to(device, dtype if value.is_floating_point() else None) if torch.is_tensor(value) else value
        for name, value in decoded.inputs.items()
    }


def _device(vlm: Vlm) -> torch.device:
    return next(vlm.core.parameters()).device
