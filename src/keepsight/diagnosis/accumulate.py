"""What one forward pass leaves behind: layer by layer inside the forward, nothing kept that grows with the data.

`Calibration` is a short pass over a seeded subset of the images. It fixes, per layer, what the main pass needs to know
beforehand: the mean token (for centring), the norm above which a token is a sink, and the channels that dominate.
`Accumulator` is the main pass. Both are fed by `sink(layer, tokens)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from keepsight.diagnosis.spectrum import CovarianceSums
from keepsight.diagnosis.store import LayerStore
from keepsight.diagnosis.structure import Groups, Structure, structure

SINK = 10.0  # a token or channel is a sink above this multiple of the layer's median norm
SCOPES = ("all", "without sinks", "tiles", "thumbnail")
VALUES = (
    "token_norm",
    "token_homogeneity/raw",
    "token_homogeneity/centred",
    "cohesion/raw",
    "coupling/raw",
    "cohesion/centred",
    "coupling/centred",
)
COLUMNS = (*(f"{scope}|{value}" for scope in SCOPES for value in VALUES), "sink_tokens")


@dataclass
class Batch:
    """The visual tokens of a batch: T tokens of B images, K objects.

    image: [T]; thumbnail: bool [T]; objects: bool [K, T]; owner: [K], image of each object;
    sample: [t] token indices for the spectrum; group: [B], each image's jackknife group.
    """

    image: Tensor
    n_images: int
    thumbnail: Tensor
    objects: Tensor
    owner: Tensor
    sample: Tensor
    group: Tensor
    scopes: dict[str, Groups] = field(init=False)

    def __post_init__(self) -> None:
        everything = Groups.build(self.image, self.n_images, self.objects, self.owner)
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
        return Batch(image, self.n_images, thumbnail, objects, owner, sample, group)


@dataclass(frozen=True)
class LayerCalibration:
    """mean, mean_without_sinks: [d]; threshold: norm of a sink token; channels: float [d], 0 for sink channels."""

    mean: Tensor
    mean_without_sinks: Tensor
    threshold: float
    channels: Tensor
    has_sinks: bool

    @property
    def sink_channels(self) -> int:
        return int((self.channels == 0).sum())


class Calibration:
    """Means, thresholds and dominating channels of every layer, from the tokens of a few images.

    Sums are kept of the tokens that cannot be sinks; the few that may be (norm above half the bound by their batch's
    own median) are held until the median of all is known.
    """

    def __init__(self) -> None:
        self._sum: dict[int, Tensor] = {}
        self._square: dict[int, Tensor] = {}
        self._count: dict[int, int] = {}
        self._norms: dict[int, list[Tensor]] = {}
        self._suspects: dict[int, list[Tensor]] = {}

    def sink(self, layer: int, tokens: Tensor) -> None:
        x = tokens.float()
        norms = torch.linalg.vector_norm(x, dim=1)
        suspect = norms > SINK / 2 * norms.median()
        ordinary = x[~suspect].double() if bool(suspect.any()) else x.double()
        self._sum[layer] = self._sum.get(layer, 0) + ordinary.sum(dim=0)
        self._square[layer] = self._square.get(layer, 0) + ordinary.square().sum(dim=0)
        self._count[layer] = self._count.get(layer, 0) + ordinary.shape[0]
        self._norms.setdefault(layer, []).append(norms)
        self._suspects.setdefault(layer, []).append(x[suspect])

    def finish(self) -> dict[int, LayerCalibration]:
        return {layer: self._layer(layer) for layer in self._sum}

    def _layer(self, layer: int) -> LayerCalibration:
        suspects = torch.cat(self._suspects[layer]).double()
        threshold = SINK * float(torch.cat(self._norms[layer]).median())
        sinks = torch.linalg.vector_norm(suspects, dim=1) > threshold
        ordinary = suspects[~sinks]
        count = self._count[layer] + ordinary.shape[0]
        total = self._sum[layer] + ordinary.sum(dim=0)
        square = self._square[layer] + ordinary.square().sum(dim=0)
        size = (square / max(count, 1)).sqrt()  # of each channel, over the tokens that are no sinks
        channels = size <= SINK * size.median()
        mean = (total + suspects[sinks].sum(dim=0)) / (count + int(sinks.sum()))
        return LayerCalibration(
            mean=mean.float(),
            mean_without_sinks=(total / max(count, 1)).float(),
            threshold=threshold,
            channels=channels.float(),
            has_sinks=bool(sinks.any()) or not bool(channels.all()),
        )


class Accumulator:
    """Pooled features, per-image values and the spectrum's tokens of every layer.

    Args:
        layers: the captured layers, rising.
        folder: where the rows go.
        exact: sum the covariance of all tokens as they come, instead of keeping a sample of tokens.
    """

    def __init__(
        self, layers: Sequence[int], width: int, calibration: dict[int, LayerCalibration], folder: Path, exact: bool
    ) -> None:
        self.layers = list(layers)
        self.width = width
        self.calibration = calibration
        self.pooled = LayerStore(folder / "pooled.f32", len(layers), width)
        self.values = LayerStore(folder / "values.f32", len(layers), len(COLUMNS))
        self.sampled = LayerStore(folder / "sampled.f32", len(layers), width)
        self.sample_group: list[int] = []
        self.sums: dict[int, list[CovarianceSums | None]] | None = {} if exact else None
        self.objects = self.skipped_objects = self.images_with_objects = 0
        self._batch: Batch | None = None
        self._taken: dict[str, list[Tensor]] = {}

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
        blocks = {"all": _block(everything, raw, structure(x, everything, centre=known.mean))}
        sinks = raw.norms > known.threshold
        any_sinks = bool(sinks.any())
        if known.has_sinks or any_sinks:
            kept = everything.keep(~sinks)
            bare = structure(x, kept, channels=known.channels)
            centred = structure(x, kept, centre=known.mean_without_sinks, channels=known.channels)
            blocks["without sinks"] = _block(kept, bare, centred)
        else:
            blocks["without sinks"] = blocks["all"]
        for scope, groups in batch.scopes.items():
            if scope != "all":
                blocks[scope] = _block(groups, structure(x, groups), structure(x, groups, centre=known.mean))
        absent = x.new_full((batch.n_images, len(VALUES)), float("nan"))
        count = x.new_zeros(batch.n_images, 1)
        if any_sinks:
            count[:, 0] = everything.weights[everything.image_row] @ sinks.float()
        self._taken["values"].append(torch.cat([*(blocks.get(s, absent) for s in SCOPES), count], dim=1))

        if layer == self.layers[0]:
            self._count_objects(raw)
        if self.sums is None:
            self._taken["sampled"].append(x[batch.sample])
        else:
            self._add(layer, x, sinks)

    def _count_objects(self, raw: Structure) -> None:
        assert self._batch is not None
        defined = ~raw.cohesion.isnan()
        self.objects += int(defined.sum())
        self.skipped_objects += int((~defined).sum())
        self.images_with_objects += int(self._batch.owner[defined].unique().numel())

    def _add(self, layer: int, x: Tensor, sinks: Tensor) -> None:
        assert self._batch is not None
        assert self.sums is not None
        both = self.sums.setdefault(layer, [None, None])
        groups = self._batch.group[self._batch.image]
        for index, chosen in enumerate((~sinks, sinks)):
            for group in groups[chosen].unique().tolist():
                sums = both[index]
                if sums is None:
                    sums = CovarianceSums(x.shape[1], shift=self.calibration[layer].mean, device=str(x.device))
                    both[index] = sums
                sums.update(x[chosen & (groups == group)], group)

    def end(self) -> None:
        """The forward of the present batch is over: write its rows."""
        assert self._batch is not None
        self.pooled.append(torch.stack(self._taken["pooled"]))
        self.values.append(torch.stack(self._taken["values"]))
        if self.sums is None:
            self.sampled.append(torch.stack(self._taken["sampled"]))
            batch = self._batch
            self.sample_group += batch.group[batch.image[batch.sample]].tolist()
        self._batch, self._taken = None, {}

    def covariance(self, position: int) -> tuple[CovarianceSums, CovarianceSums | None]:
        """Sums over the ordinary tokens and over the sinks (None without any) of the layer in this position."""
        layer = self.layers[position]
        known = self.calibration[layer]
        if self.sums is not None:
            ordinary, sinks = self.sums[layer]
            return ordinary or CovarianceSums(known.mean.shape[0], shift=known.mean), sinks
        x = torch.from_numpy(self.sampled.read(position)).to(known.mean.device)
        group = torch.tensor(self.sample_group, device=x.device)
        heavy = torch.linalg.vector_norm(x, dim=1) > known.threshold
        parts: list[CovarianceSums | None] = []
        for chosen in (~heavy, heavy):
            if chosen is heavy and not bool(heavy.any()):
                parts.append(None)
                continue
            sums = CovarianceSums(x.shape[1], shift=known.mean, device=str(x.device))
            for g in group[chosen].unique().tolist():
                sums.update(x[chosen & (group == g)], g)
            parts.append(sums)
        assert parts[0] is not None
        return parts[0], parts[1]


def _block(groups: Groups, raw: Structure, centred: Structure) -> Tensor:
    """[B, len(VALUES)], one row an image."""
    norm = groups.token_mean(raw.norms)
    objects = torch.stack([raw.cohesion, raw.coupling, centred.cohesion, centred.coupling], dim=1)
    images = torch.stack([norm, raw.homogeneity, centred.homogeneity], dim=1)
    return torch.cat([images, groups.image_mean(objects)], dim=1)
