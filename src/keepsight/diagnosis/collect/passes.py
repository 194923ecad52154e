"""The forward passes of a diagnosis: a short one over a few pictures for calibration, then one over all."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keepsight.diagnosis.collect.accumulate import Accumulator
from keepsight.diagnosis.collect.batches import Decoded, Loader
from keepsight.diagnosis.collect.calibrate import Calibration, LayerCalibration
from keepsight.diagnosis.collect.kept import Kept
from keepsight.diagnosis.collect.record import Record
from keepsight.diagnosis.memory import give_back
from keepsight.diagnosis.progress import tracked
from keepsight.processes import Team
from keepsight.vlm import Vlm, capture
from keepsight.vlm.features import ProjectorInput, image_features

COUNTED = 256  # images whose patches' neighbours are counted: beyond them, it would cost as much as a few layers
TIDY = 32  # batches after which free memory is given back, which takes milliseconds
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
    by_object: bool = False,
    progress: bool = False,
    team: Team = Team(),  # noqa: B008 - it is frozen
    kept: Kept | None = None,
) -> tuple[Accumulator, list[int]]:
    """The calibration pass and the main pass: the filled accumulator and the indices of the pictures it holds.

    Batches are the same whatever the number of processes, and are taken in their order by the first one, so that its
    accumulator is what one process would have; that of the others stays empty.

    Args:
        exact: sample every token.
        encoder: the model whose vision encoder's output is kept at the sampled tokens: this one, or another checkpoint.
        bleeding: also count neighbours.
        by_object: keep the values of each object.
        team: the processes that share out the pictures.
        kept: what is there already, and where the rest is kept; the first process's alone.

    Raises:
        ValueError: no picture could be read, or the temporary folder has no room for all tokens (`exact`).
        RuntimeError: another process failed.
    """
    n = len(loader.pictures)
    calibration, tokens = team.from_first(
        team.together(lambda: _calibration(vlm, loader, layers, calibration_images, kept) if team.first else ({}, 0.0))
    )
    calibration = {layer: one.to(device_of(vlm)) for layer, one in calibration.items()}
    loader.rate = 1.0 if exact else min(1.0, max(SAMPLE, 2 * vlm.width) / (n * tokens))
    loader.counted = COUNTED / n  # of one or more, all
    if exact and team.first:
        _check_room(folder, int(4 * len(layers) * vlm.width * n * tokens))
    direct = team.size == 1 and kept is None
    accumulator = Accumulator(layers, vlm.width, calibration, folder, exact, bleeding, by_object, direct)
    batches = [range(start, min(start + loader.batch_size, n)) for start in range(0, n, loader.batch_size)]
    known = team.from_first(kept.batches() if kept else set())
    waiting = [number for number in range(len(batches)) if number not in known]
    total = -(-len(waiting) // team.size)
    done: list[int] = []
    source = None if encoder is None else EncoderOutput(encoder, vlm)

    def append(number: int, record: Record) -> None:
        loader.seen.update(record.seen)
        accumulator.append(record)
        done.extend(record.indices)
        known.discard(number)

    def append_known(before: int) -> None:
        for number in sorted(one for one in known if one < before):
            assert kept is not None
            append(number, kept.load(number))

    def step(group: Sequence[int]) -> Record | None:
        if team.rank >= len(group):
            return None
        return accumulate(vlm, loader, batches[group[team.rank]], accumulator, source)

    def take(group: Sequence[int], records: Sequence[Record | None]) -> None:
        for number, record in zip(group, records, strict=False):
            assert record is not None
            if kept is not None:
                kept.save(number, record)
            append_known(number)
            append(number, record)

    try:
        groups = [waiting[start : start + team.size] for start in range(0, len(waiting), team.size)]
        for number, group in enumerate(tracked(groups, "pictures", progress, total)):
            records = team.to_first(team.together(partial(step, group)))
            team.together(partial(take, group, records))
            if number % TIDY == 0:
                give_back()
        if team.first:
            append_known(len(batches))
    finally:
        if source is not None:
            source.remove()
    return accumulator, done


def _calibration(
    vlm: Vlm, loader: Loader, layers: Sequence[int], size: int | None, kept: Kept | None
) -> tuple[dict[int, LayerCalibration], float]:
    """The calibration and the mean number of tokens of its images, or those that are kept."""
    if kept is not None and (found := kept.load_calibration()):
        return found
    n = len(loader.pictures)
    size = min(n, size or min(32, max(8, n // 64)))  # a second forward for these: one in 64 costs a hundredth or two
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
    finished = {layer: one.to(torch.device("cpu")) for layer, one in calibration.finish().items()}
    if kept is not None:
        kept.save_calibration(finished, tokens / seen)
    return finished, tokens / seen


def accumulate(
    vlm: Vlm, loader: Loader, indices: Sequence[int], accumulator: Accumulator, source: EncoderOutput | None = None
) -> Record:
    """Load one batch of the main pass and run it; `source`: where the encoder's output comes from, if it is wanted."""
    decoded, seen = loader.load(indices, masks=True)
    record = Record() if decoded is None else run_batch(vlm, decoded, accumulator, source)
    record.seen = seen
    return record


def run_batch(vlm: Vlm, decoded: Decoded, accumulator: Accumulator, source: EncoderOutput | None = None) -> Record:
    """One batch of the main pass."""
    accumulator.begin(decoded.batch.to(device_of(vlm)))
    forward(vlm, decoded, accumulator.layers, accumulator.sink)
    if source is not None:
        source.keep(decoded, accumulator)
    return accumulator.end(decoded.indices)


class EncoderOutput:
    """The vision encoder's output on the visual tokens of each batch, of the diagnosed model or of another checkpoint.

    Args:
        encoder: the model whose encoder is asked. vlm: the diagnosed one, whose forward has run.
    """

    def __init__(self, encoder: Vlm, vlm: Vlm) -> None:
        self.encoder = encoder
        self._runs = encoder is vlm
        self._why = ""
        self._worked = False
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
                self._worked = True
                return
            except ValueError as error:  # a family whose patches have no tokens; found at the first batch
                if self._worked:
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
    """A forward without LM head and cache that hands each layer's visual tokens to `sink`, on `device_of` the model."""
    device = device_of(vlm)
    with capture(vlm, layers, sink=lambda layer, tokens: sink(layer, tokens.to(device))):
        vlm.forward_core(**on_device(vlm, decoded))


def on_device(vlm: Vlm, decoded: Decoded) -> dict[str, Any]:
    """The model's inputs where it is, in its dtype."""
    device, dtype = device_of(vlm), next(vlm.core.parameters()).dtype
    return {
        name: value.to(device, dtype if value.is_floating_point() else None) if torch.is_tensor(value) else value
        for name, value in decoded.inputs.items()
    }


def device_of(vlm: Vlm) -> torch.device:
    """Where pictures go in and numbers are computed: of a model on several devices (`device_map`), the first one's.

    Weights that wait elsewhere until they are needed say "meta"; where all do, the model knows where they are run.
    """
    given = [parameter.device for parameter in vlm.core.parameters()]
    here = next((device for device in given if device.type != "meta"), None)
    run = getattr(getattr(vlm.base, "_hf_hook", None), "execution_device", None)
    return here or (given[0] if run is None else torch.device(run))
