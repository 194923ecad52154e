"""What one forward pass leaves behind: layer by layer inside the forward, nothing kept that grows with the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from keepsight.diagnosis.collect.batch import Batch
from keepsight.diagnosis.collect.calibrate import LayerCalibration, check_finite
from keepsight.diagnosis.collect.mean_tokens import MeansWithoutSinks, RowsWithoutSinks
from keepsight.diagnosis.collect.record import Record
from keepsight.diagnosis.collect.store import LayerStore
from keepsight.diagnosis.metrics.bleeding import bleeding
from keepsight.diagnosis.metrics.spectrum import CHUNK, CovarianceSums
from keepsight.diagnosis.metrics.structure import Groups, Structure, structure

BLOCK = 1024  # sampled tokens read at a time
SCOPES = ("all", "without sinks", "tiles", "thumbnail")
VALUES = (
    "token_norm",
    "token_homogeneity/raw",
    "token_homogeneity/centred",
    "cohesion/raw",
    "coupling/raw",
    "cohesion/centred",
    "coupling/centred",
    "bleeding/raw",
    "bleeding/centred",
)
OBJECT_SCOPES = SCOPES[:2]
OBJECT_VALUES = ("cohesion/raw", "coupling/raw", "cohesion/centred", "coupling/centred")
COLUMNS = (*(f"{scope}|{value}" for scope in SCOPES for value in VALUES), "sink_tokens")


class Accumulator:
    """Pooled features, per-image values and a seeded sample of tokens of every layer.

    Args:
        layers: the captured layers, rising.
        folder: where the rows go.
        exact: whether the sample holds every token; only said in the rows.
        bleeding: whether to count neighbours as well.
        by_object: whether to keep the values of each object.
        direct: the sampled tokens of each layer go to the disk at once, so that a batch's are never in memory together;
            its record, which lacks them, is for this accumulator only.

    Attributes:
        pooled: the mean token of each image; bare: the same without sinks, for `without_sinks`.
        encoder, encoder_pooled: the vision encoder's output at the sampled tokens, and its mean over each image; None
            until it is given, with `no_encoder` the reason if it cannot be had.
        object_values: the values of each object at each layer; object_classes: their classes.
    """

    def __init__(
        self,
        layers: Sequence[int],
        width: int,
        calibration: dict[int, LayerCalibration],
        folder: Path,
        exact: bool = False,
        bleeding: bool = True,
        by_object: bool = False,
        direct: bool = False,
    ) -> None:
        self.layers = list(layers)
        self.width = width
        self.calibration = calibration
        self.exact = exact
        self.bleeding = bleeding
        self.by_object = by_object
        self.direct = direct
        self.pooled = LayerStore(folder / "pooled", len(layers), width)
        self.bare = MeansWithoutSinks(folder / "bare", self.pooled, [calibration[at].channels for at in self.layers])
        self.values = LayerStore(folder / "values", len(layers), len(COLUMNS))
        self.sampled = LayerStore(folder / "sampled", len(layers), width)
        self.object_values = LayerStore(folder / "objects", len(layers), len(OBJECT_SCOPES) * len(OBJECT_VALUES))
        self.object_classes: list[str] = []
        self.encoder: LayerStore | None = None
        self.encoder_pooled: LayerStore | None = None
        self.no_encoder = "fidelity was not asked for"
        self.objects = self.skipped_objects = self.images_with_objects = 0
        self.folder = folder
        self._sample: list[np.ndarray] = []
        self._objects: list[np.ndarray] = []
        self._batch: Batch | None = None
        self._taken: dict[str, list[Tensor]] = {}
        self._counts = (0, 0, 0)

    @property
    def device(self) -> torch.device:
        """Where the tokens come from."""
        return next(iter(self.calibration.values())).mean.device

    def begin(self, batch: Batch) -> None:
        """The batch whose forward is about to run."""
        self._batch = batch
        self._taken = {"pooled": [], "bare": [], "values": [], "sampled": [], "object_values": []}

    def sink(self, layer: int, tokens: Tensor) -> None:
        """One layer's tokens [T, d] of the present batch."""
        assert self._batch is not None
        batch, known, x = self._batch, self.calibration[layer], tokens.float()
        everything = batch.scopes["all"]
        self._taken["pooled"].append(everything.token_mean(x))

        raw = structure(x, everything)
        check_finite(raw.norms, layer)
        blocks = {"all": self._block(x, everything, raw, known.mean)}
        sinks = raw.norms > known.threshold
        any_sinks = bool(sinks.any())
        if known.has_sinks or any_sinks:
            kept = everything.keep(~sinks) if any_sinks else everything
            bare = structure(x, kept, channels=known.channels)
            blocks["without sinks"] = self._block(x, kept, bare, known.mean_without_sinks, known.channels)
        else:
            blocks["without sinks"] = blocks["all"]
        for scope, groups in batch.scopes.items():
            if scope != "all":
                blocks[scope] = self._block(x, groups, structure(x, groups), known.mean)
        absent = x.new_full((batch.n_images, len(VALUES)), float("nan"))
        count = x.new_zeros(batch.n_images, 1)
        if any_sinks:
            count[:, 0] = everything.weights[: everything.n_images] @ sinks.float()
            # Summed without the sinks, not subtracted from the sum: beside them the rest would lose its digits.
            self._taken["bare"].append(kept.mean_weights[count[:, 0] > 0] @ x)
        rows = [blocks[s][0] if s in blocks else absent for s in SCOPES]
        self._taken["values"].append(torch.cat([*rows, count], dim=1))
        if self.by_object:
            self._taken["object_values"].append(torch.cat([blocks[s][1] for s in OBJECT_SCOPES], dim=1))

        if layer == self.layers[0]:
            self._count_objects(raw)
        sampled = x if len(batch.sample) == len(x) else x[batch.sample]
        if self.direct:
            self.sampled.put(self.layers.index(layer), sampled)
        else:
            self._taken["sampled"].append(sampled)

    def _block(
        self, x: Tensor, groups: Groups, raw: Structure, mean: Tensor, channels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """[B, len(VALUES)], one row an image, and [K, len(OBJECT_VALUES)], one an object."""
        centred = structure(x, groups, centre=mean, channels=channels)
        objects = torch.stack([raw.cohesion, raw.coupling, centred.cohesion, centred.coupling], dim=1)
        images = torch.stack([groups.token_mean(raw.norms), raw.homogeneity, centred.homogeneity], dim=1)
        means = groups.image_mean(objects)
        spilt = x.new_full((groups.n_images, 2), float("nan"))
        if self.bleeding:
            both = [bleeding(x, groups.near, centre, channels) for centre in (None, mean)]
            spilt = groups.counted_mean(torch.stack(both, dim=1))
        return torch.cat([images, means, spilt], dim=1), objects

    def _count_objects(self, raw: Structure) -> None:
        assert self._batch is not None
        defined = ~raw.cohesion.isnan()
        owners = self._batch.owner[defined]
        self._counts = (len(owners), int((~defined).sum()), int(owners.unique().numel()))

    def take_encoder(self, features: Tensor) -> None:
        """The vision encoder's output [T, d_v] on the tokens of the present batch."""
        assert self._batch is not None
        x = features.float()
        self._taken["encoder"] = [x[self._batch.sample]]
        self._taken["encoder_pooled"] = [self._batch.scopes["all"].token_mean(x)]

    def end(self, indices: Sequence[int]) -> Record:
        """The forward of the present batch is over: what it left behind, for `append`. `indices`: its pictures."""
        batch = self._batch
        assert batch is not None
        image = batch.image[batch.sample]
        bare = self._taken.pop("bare")
        tensors = {name: torch.stack(parts).cpu() for name, parts in self._taken.items() if parts}
        if bare:
            tensors["bare"] = torch.cat(bare).cpu()
        tensors["sample"] = torch.stack([image, batch.group[image], batch.place[batch.sample]]).int().cpu()
        tensors["object_owner"] = batch.owner.int().cpu()
        tensors["object_patches"] = batch.objects.sum(dim=1).int().cpu()
        self._batch, self._taken = None, {}
        return Record(list(indices), tensors, list(batch.classes), self._counts, self.no_encoder)

    def append(self, record: Record) -> None:
        """Take in the rows of one batch, of this process or another.

        Raises:
            ValueError: it lacks the encoder's output that others have.
        """
        if not record.indices:
            return
        tensors, rows = record.tensors, self.pooled.rows
        if "encoder" in tensors:
            if self.encoder is None or self.encoder_pooled is None:
                self.encoder = LayerStore(self.folder / "encoder", 1, tensors["encoder"].shape[2])
                self.encoder_pooled = LayerStore(self.folder / "encoder-pooled", 1, tensors["encoder"].shape[2])
            self.encoder.append(tensors["encoder"])
            self.encoder_pooled.append(tensors["encoder_pooled"])
        elif self.encoder is not None:
            raise ValueError(record.no_encoder)
        self.no_encoder = record.no_encoder
        self._sample.append(tensors["sample"].numpy() + np.array([[rows], [0], [0]], np.int32))
        self.pooled.append(tensors["pooled"])
        if "bare" in tensors:
            self.bare.append(tensors["bare"], tensors["values"][:, :, COLUMNS.index("sink_tokens")])
        self.values.append(tensors["values"])
        if "sampled" in tensors:
            self.sampled.append(tensors["sampled"])
        else:
            self.sampled.commit(tensors["sample"].shape[1])
        if self.by_object:
            self.object_values.append(tensors["object_values"])
            self.object_classes += record.classes
            owner = tensors["object_owner"].numpy() + rows
            self._objects.append(np.stack([owner, tensors["object_patches"].numpy()]))
        self.objects += record.counts[0]
        self.skipped_objects += record.counts[1]
        self.images_with_objects += record.counts[2]

    @property
    def object_table(self) -> np.ndarray:
        """[2, K]: image and number of patches of each object in `object_values`."""
        return np.concatenate(self._objects, axis=1) if self._objects else np.zeros((2, 0), np.int32)

    @property
    def sample(self) -> np.ndarray:
        """[3, n]: image, jackknife group and place of each sampled token."""
        return np.concatenate(self._sample, axis=1)

    def without_sinks(self, position: int, images: np.ndarray) -> RowsWithoutSinks:
        """The mean tokens [n, d] of these images, without the sinks of the layer in this position."""
        return self.bare.rows_of(position, images, self.values.read(position)[:, COLUMNS.index("sink_tokens")])

    def blocks(self, position: int) -> Iterator[tuple[slice, Tensor]]:
        """The sampled tokens of the layer in this position, a bounded number at a time: (which rows, [rows, d])."""
        for start in range(0, self.sampled.rows, BLOCK):
            x = torch.from_numpy(self.sampled.read(position, start, start + BLOCK)).to(self.device)
            yield slice(start, start + len(x)), x

    def covariance(self, position: int) -> tuple[CovarianceSums, int]:
        """Sums over the ordinary tokens of the layer in this position, and how many sinks were left out of them."""
        known = self.calibration[self.layers[position]]
        sums = CovarianceSums(self.width, shift=known.mean, device=str(known.mean.device))
        return sums, self._sum(position, sums, sinks=False)

    def add_sinks(self, position: int, sums: CovarianceSums) -> None:
        """Add the sinks to what `covariance` gave. Apart, as sums of their own would take as much memory again."""
        self._sum(position, sums, sinks=True)

    def _sum(self, position: int, sums: CovarianceSums, *, sinks: bool) -> int:
        """Group by group, so that each product is over as many tokens as it may be."""
        threshold, left_out = self.calibration[self.layers[position]].threshold, 0
        group = self.sample[1]
        for g in np.unique(group):
            rows = np.flatnonzero(group == g)
            for start in range(0, len(rows), CHUNK):
                x = torch.from_numpy(self.sampled.gather(position, rows[start : start + CHUNK])).to(self.device)
                chosen = (torch.linalg.vector_norm(x, dim=1) > threshold) == sinks
                others = int((~chosen).sum())
                left_out += others
                if others < len(x):
                    sums.update(x[chosen] if others else x, int(g))
        return left_out
