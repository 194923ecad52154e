"""Fidelity: how much of what the vision encoder put out can still be read, linearly, from the tokens of a layer.

Ours: the direct measure that the paper lacks. A ridge regression predicts a visual token's target from its state at
layer l; it is trained, tuned and scored on different images. The primary target is the vision encoder's output, which
is the same whatever happens above it; h[0] is secondary, because it can also be predicted well by becoming poorer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keepsight.diagnosis.collect.accumulate import BLOCK, Accumulator
from keepsight.diagnosis.collect.store import LayerStore
from keepsight.diagnosis.metrics.baselines import partners, place_score, split_images
from keepsight.diagnosis.metrics.ridge import (
    TEST,
    TRAIN,
    UNUSED,
    VALIDATION,
    Fit,
    Moments,
    Score,
    directions,
    fit_ridge,
)
from keepsight.diagnosis.metrics.spectrum import CovarianceSums, spectrum
from keepsight.results import Measurement, PerImageBuilder
from keepsight.results.intervals import mean_interval, ratio_interval, ratio_shares

OTHER, PLACE = "another image, same place", "position only"
DIRECTIONS = 128  # of a wider h[0], which would cost more than everything else
FEWEST = 5  # images that a split needs
TARGETS = {"fidelity": "the vision encoder's output", "fidelity_input": "h[0]"}


class Fidelity:
    """Fidelity of every layer of a diagnosis, from its sample of tokens.

    Args:
        accumulator: after the main pass.
        per_image: takes what each test image adds to each number.
        seed: of the split of the images.
    """

    def __init__(self, accumulator: Accumulator, per_image: PerImageBuilder, seed: int) -> None:
        self.per_image = per_image
        self.accumulator = accumulator
        self.seed = seed
        self.image, _, self.place = accumulator.sample
        images = accumulator.pooled.rows
        self.part = split_images(images, seed)[self.image] if images >= FEWEST else np.full(len(self.image), UNUSED)
        self.missing: dict[str, str] = {}
        self.stores: dict[str, tuple[LayerStore, int]] = {}
        if accumulator.encoder is None:
            self.missing["fidelity"] = accumulator.no_encoder
        else:
            self.stores["fidelity"] = (accumulator.encoder, 0)
        if 0 in accumulator.layers:
            self.stores["fidelity_input"] = self._input_store()
        else:
            self.missing["fidelity_input"] = "layer 0 was not captured"
        if {TRAIN, VALIDATION, TEST} - set(self.part):
            why = f"{images} images are too few to train, tune and score on; at least {FEWEST} are needed"
            self.missing, self.stores = dict.fromkeys(TARGETS, why), {}
        self.partner = partners(self.part, self.place, self.image, seed)
        self.by_place = {name: self._by_place(name, self.part) for name in self.stores}
        whole = {**self.stores, **({"fidelity_input": self._input()} if "fidelity_input" in self.stores else {})}
        self.ranks = {name: self._rank(*where) for name, where in whole.items()}

    def _input(self) -> tuple[LayerStore, int]:
        return self.accumulator.sampled, self.accumulator.layers.index(0)

    def _input_store(self) -> tuple[LayerStore, int]:
        """h[0] at the sampled tokens; of a wide one, seeded directions of its standardised channels."""
        store, position = self._input()
        if store.width <= DIRECTIONS:
            return store, position
        moments = Moments()
        for rows, x in self.accumulator.blocks(position):
            chosen = x[torch.from_numpy(self.part[rows] == TRAIN).to(x.device)]
            if len(chosen):
                moments.add(chosen)
        if not moments.count:
            return store, position
        scale = moments.scale()
        turned = directions(store.width, DIRECTIONS, self.seed).to(self.accumulator.device)
        found = LayerStore(self.accumulator.folder / "input", 1, DIRECTIONS)
        for _, x in self.accumulator.blocks(position):
            found.append((scale(x) @ turned)[None])
        return found, 0

    def general_rows(self) -> list[Measurement]:
        """What is not of one layer: why a target is missing, and each target's effective rank."""
        rows = [Measurement(name, None, seed=self.seed, note=why) for name, why in self.missing.items()]
        for name, estimate in self.ranks.items():
            n = self.accumulator.sampled.rows
            more: dict[str, Any] = {"n": n, "unit": "tokens", "variant": TARGETS[name], "seed": self.seed}
            rows.append(Measurement("fidelity_target_rank", **estimate.fields, **more, note=estimate.note))
        return rows

    def rows(self, position: int) -> list[Measurement]:
        """Fidelity of the layer in this position, with and without its sinks."""
        if not self.stores:
            return []
        known = self.accumulator.calibration[self.accumulator.layers[position]]
        heavy = np.concatenate(
            [
                (torch.linalg.vector_norm(x, dim=1) > known.threshold).cpu().numpy()
                for _, x in self.accumulator.blocks(position)
            ]
        )
        self._no_sinks = not heavy.any() and not known.sink_channels
        found = self._measure(position, self.part, "all", self.by_place)
        if self._no_sinks:
            return found + [replace(row, tokens="without sinks") for row in found]
        part = np.where(heavy, UNUSED, self.part)
        if {TRAIN, VALIDATION, TEST} - set(part):
            why = "too few tokens are no sinks"
            base: dict[str, Any] = {"layer": self.accumulator.layers[position], "tokens": "without sinks"}
            return found + [Measurement(name, None, seed=self.seed, note=why, **base) for name in self.stores]
        by_place = {name: self._by_place(name, part) for name in self.stores} if heavy.any() else self.by_place
        return found + self._measure(position, part, "without sinks", by_place)

    def _measure(self, position: int, part: np.ndarray, tokens: str, by_place: dict[str, Score]) -> list[Measurement]:
        layer = self.accumulator.layers[position]
        channels = self.accumulator.calibration[layer].channels > 0

        def blocks() -> Iterator[tuple[np.ndarray, Tensor]]:
            for rows, x in self.accumulator.blocks(position):
                kept = x if tokens == "all" else x[:, channels]
                yield np.arange(rows.start, rows.stop), kept

        readers: dict[tuple[str, str], Any] = {(name, ""): partial(self._read, name) for name in self.stores}
        if "fidelity" in self.stores:
            readers["fidelity", OTHER] = self._read_partner
        wanted = {"|".join(key): read for key, read in readers.items()}
        fit = fit_ridge(blocks, wanted, part, self.image, seed=self.seed)
        rows: list[Measurement] = []
        for name, variant in readers:
            note = _note(fit, fit.scores[f"{name}|{variant}"])
            if name == "fidelity_input" and self.ranks[name].value is not None:
                note += f"; effective rank of h[0] {self.ranks[name].value:.1f}"
            if name == "fidelity_input" and self.accumulator.width > DIRECTIONS:
                note += f"; on {DIRECTIONS} seeded directions of it"
            rows += self._score_rows(name, fit.scores[f"{name}|{variant}"], variant, layer, tokens, note)
        for name, score in by_place.items():
            note = f"mean of the training tokens at the same place, shrunk by {score.strength:g} tokens"
            rows += self._score_rows(name, score, PLACE, layer, tokens, note)
        return rows

    def _score_rows(
        self, name: str, score: Score, variant: str, layer: int, tokens: str, note: str
    ) -> list[Measurement]:
        lost = ratio_interval(score.error, score.spread)
        common: dict[str, Any] = {"layer": layer, "variant": variant, "tokens": tokens, "seed": self.seed}
        cosine = mean_interval(score.cosine)
        n, defined = len(score.error), int((~np.isnan(score.cosine)).sum())
        if lost.value is None:
            first = Measurement(name, None, n=n, note="the target does not vary over the test tokens", **common)
        else:
            low, high = (None if end is None else 1 - end for end in (lost.high, lost.low))
            said = "; ".join(filter(None, [lost.note, note]))
            first = Measurement(name, 1 - lost.value, low=low, high=high, n=n, note=said, **common)
        said = "; ".join(filter(None, [cosine.note, note]))
        second = Measurement(f"{name}_cosine", **cosine.fields, n=defined, note=said, **common)
        if first.value is not None:
            self._keep(first, 1 - ratio_shares(score.error, score.spread), score.images)
        self._keep(second, score.cosine, score.images)
        return [first, second]

    def _keep(self, row: Measurement, values: np.ndarray, images: np.ndarray) -> None:
        self.per_image.add(row.key, values, images)
        if row.tokens == "all" and self._no_sinks:
            self.per_image.add(replace(row, tokens="without sinks").key, values, images)

    def _read(self, name: str, rows: np.ndarray) -> Tensor:
        store, position = self.stores[name]
        device = self.accumulator.device
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
            return torch.from_numpy(store.read(position, int(rows[0]), int(rows[-1]) + 1)).to(device)
        return torch.from_numpy(store.gather(position, rows)).to(device)

    def _read_partner(self, rows: np.ndarray) -> Tensor:
        return self._read("fidelity", self.partner[rows])

    def _by_place(self, name: str, part: np.ndarray) -> Score:
        return place_score(lambda rows: self._read(name, rows), part, self.place, self.image)

    def _rank(self, store: LayerStore, position: int) -> Any:
        group = torch.from_numpy(self.accumulator.sample[1])
        shift = torch.from_numpy(store.read(position, 0, BLOCK)).mean(dim=0)
        sums = CovarianceSums(store.width, shift=shift)
        for start in range(0, store.rows, BLOCK):
            x = torch.from_numpy(store.read(position, start, start + BLOCK))
            for g in group[start : start + BLOCK].unique().tolist():
                sums.update(x[group[start : start + BLOCK] == g], g)
        return spectrum(sums)["entropy_rank", "covariance"]


def _note(fit: Fit, score: Score) -> str:
    parts = [f"{fit.train} tokens trained on, {fit.test} scored", f"ridge {score.strength:g} of the mean variance"]
    if fit.constant or score.constant:
        parts.append(f"constant channels left out: {fit.constant} of the layer, {score.constant} of the target")
    return "; ".join(parts)
