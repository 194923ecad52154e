"""What one forward pass leaves behind: layer by layer inside the forward, nothing kept that grows with the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from keepsight.diagnosis.bleeding import bleeding
from keepsight.diagnosis.calibrate import LayerCalibration
from keepsight.diagnosis.spectrum import CovarianceSums
from keepsight.diagnosis.store import LayerStore
from keepsight.diagnosis.structure import Groups, Structure, structure

BLOCK = 4096  # sampled tokens read at a time
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
COLUMNS = (*(f"{scope}|{value}" for scope in SCOPES for value in VALUES), "sink_tokens")


@dataclass
class Batch:
    """The visual tokens of a batch: T tokens of B images, K objects.

    image: [T]; thumbnail: bool [T]; objects: bool [K, T]; owner: [K], image of each object;
    sample: [t] token indices of the seeded sample; group: [B], each image's jackknife group; place: [T], a number for
    each tile, row and column, the same in every image; counted: bool [B], the images whose neighbours are counted.
    """

    image: Tensor
    n_images: int
    thumbnail: Tensor
    objects: Tensor
    owner: Tensor
    sample: Tensor
    group: Tensor
    place: Tensor
    counted: Tensor
    scopes: dict[str, Groups] = field(init=False)

    def __post_init__(self) -> None:
        everything = Groups.build(self.image, self.n_images, self.objects, self.owner, self.counted)
        self.scopes = {"all": everything}
        if bool(self.thumbnail.any()):
            # Pictures in one piece are in neither: both numbers are of the same pictures, whatever the batch.
            tiled = torch.bincount(self.image[self.thumbnail], minlength=self.n_images)[self.image] > 0
            self.scopes["tiles"] = everything.keep(~self.thumbnail & tiled)
            self.scopes["thumbnail"] = everything.keep(self.thumbnail)

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        image, thumbnail, objects = self.image.to(device), self.thumbnail.to(device), self.objects.to(device)
        owner, sample, group = self.owner.to(device), self.sample.to(device), self.group.to(device)
        place, counted = self.place.to(device), self.counted.to(device)
        return Batch(image, self.n_images, thumbnail, objects, owner, sample, group, place, counted)


class Accumulator:
    """Pooled features, per-image values and a seeded sample of tokens of every layer.

    Args:
        layers: the captured layers, rising.
        folder: where the rows go.
        exact: whether the sample holds every token; only said in the rows.
        bleeding: whether to count neighbours as well.

    Attributes:
        encoder, encoder_pooled: the vision encoder's output at the sampled tokens, and its mean over each image; None
            until it is given, with `no_encoder` the reason if it cannot be had.
    """

    def __init__(
        self,
        layers: Sequence[int],
        width: int,
        calibration: dict[int, LayerCalibration],
        folder: Path,
        exact: bool = False,
        bleeding: bool = True,
    ) -> None:
        self.layers = list(layers)
        self.width = width
        self.calibration = calibration
        self.exact = exact
        self.bleeding = bleeding
        self.pooled = LayerStore(folder / "pooled", len(layers), width)
        self.values = LayerStore(folder / "values", len(layers), len(COLUMNS))
        self.sampled = LayerStore(folder / "sampled", len(layers), width)
        self.encoder: LayerStore | None = None
        self.encoder_pooled: LayerStore | None = None
        self.no_encoder = "fidelity was not asked for"
        self.objects = self.skipped_objects = self.images_with_objects = 0
        self.folder = folder
        self._sample: list[np.ndarray] = []
        self._batch: Batch | None = None
        self._taken: dict[str, list[Tensor]] = {}

    @property
    def device(self) -> torch.device:
        """Where the tokens come from."""
        return next(iter(self.calibration.values())).mean.device

    def begin(self, batch: Batch) -> None:
        """The batch whose forward is about to run."""
        self._batch = batch
        self._taken = {"pooled": [], "values": [], "sampled": []}

    def sink(self, layer: int, tokens: Tensor) -> None:
        """One layer's tokens [T, d] of the present batch."""
        assert self._batch is not None
        batch, known, x = self._batch, self.calibration[layer], tokens.float()
        everything = batch.scopes["all"]
        self._taken["pooled"].append(everything.token_mean(x))

        raw = structure(x, everything)
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
            count[:, 0] = everything.weights[everything.image_row] @ sinks.float()
        self._taken["values"].append(torch.cat([*(blocks.get(s, absent) for s in SCOPES), count], dim=1))

        if layer == self.layers[0]:
            self._count_objects(raw)
        self._taken["sampled"].append(x[batch.sample])

    def _block(self, x: Tensor, groups: Groups, raw: Structure, mean: Tensor, channels: Tensor | None = None) -> Tensor:
        """[B, len(VALUES)], one row an image."""
        centred = structure(x, groups, centre=mean, channels=channels)
        objects = [raw.cohesion, raw.coupling, centred.cohesion, centred.coupling]
        images = torch.stack([groups.token_mean(raw.norms), raw.homogeneity, centred.homogeneity], dim=1)
        means = groups.image_mean(torch.stack(objects, dim=1))
        spilt = x.new_full((groups.n_images, 2), float("nan"))
        if self.bleeding:
            both = [bleeding(x, groups.near, centre, channels) for centre in (None, mean)]
            spilt = groups.counted_mean(torch.stack(both, dim=1))
        return torch.cat([images, means, spilt], dim=1)

    def _count_objects(self, raw: Structure) -> None:
        assert self._batch is not None
        defined = ~raw.cohesion.isnan()
        self.objects += int(defined.sum())
        self.skipped_objects += int((~defined).sum())
        self.images_with_objects += int(self._batch.owner[defined].unique().numel())

    def take_encoder(self, features: Tensor) -> None:
        """The vision encoder's output [T, d_v] on the tokens of the present batch."""
        assert self._batch is not None
        x = features.float()
        if self.encoder is None or self.encoder_pooled is None:
            self.encoder = LayerStore(self.folder / "encoder", 1, x.shape[1])
            self.encoder_pooled = LayerStore(self.folder / "encoder-pooled", 1, x.shape[1])
        self.encoder.append(x[self._batch.sample][None])
        self.encoder_pooled.append(self._batch.scopes["all"].token_mean(x)[None])

    def end(self) -> None:
        """The forward of the present batch is over: write its rows."""
        batch = self._batch
        assert batch is not None
        image = batch.image[batch.sample]
        meta = torch.stack([image + self.pooled.rows, batch.group[image], batch.place[batch.sample]])
        self._sample.append(meta.cpu().numpy().astype(np.int32))
        self.pooled.append(torch.stack(self._taken["pooled"]))
        self.values.append(torch.stack(self._taken["values"]))
        self.sampled.append(torch.stack(self._taken["sampled"]))
        self._batch, self._taken = None, {}

    @property
    def sample(self) -> np.ndarray:
        """[3, n]: image, jackknife group and place of each sampled token."""
        return np.concatenate(self._sample, axis=1)

    def blocks(self, position: int) -> Iterator[tuple[slice, Tensor]]:
        """The sampled tokens of the layer in this position, a bounded number at a time: (which rows, [rows, d])."""
        for start in range(0, self.sampled.rows, BLOCK):
            x = torch.from_numpy(self.sampled.read(position, start, start + BLOCK)).to(self.device)
            yield slice(start, start + len(x)), x

    def covariance(self, position: int) -> tuple[CovarianceSums, CovarianceSums | None]:
        """Sums over the ordinary tokens and over the sinks (None without any) of the layer in this position."""
        known = self.calibration[self.layers[position]]
        device = known.mean.device
        group = torch.from_numpy(self.sample[1]).to(device)
        parts: list[CovarianceSums | None] = [CovarianceSums(self.width, shift=known.mean, device=str(device)), None]
        for rows, x in self.blocks(position):
            heavy = torch.linalg.vector_norm(x, dim=1) > known.threshold
            for index, chosen in enumerate((~heavy, heavy)):
                for g in group[rows][chosen].unique().tolist():
                    sums = parts[index]
                    if sums is None:
                        sums = parts[index] = CovarianceSums(self.width, shift=known.mean, device=str(device))
                    sums.update(x[chosen & (group[rows] == g)], g)
        assert parts[0] is not None
        return parts[0], parts[1]
