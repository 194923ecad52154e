"""A short pass over a seeded subset of the images, which fixes what the main pass must know beforehand.

Per layer: the mean token (for centring), the norm above which a token is a sink, and the channels that dominate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SINK = 10.0  # a token or channel is a sink above this multiple of the layer's median norm


def check_finite(norms: Tensor, layer: int) -> None:
    """Raises ValueError where tokens of these norms [T] are no numbers, as none could be taken of them."""
    if bad := int((~norms.isfinite()).sum()):
        raise ValueError(
            f"{bad} of {len(norms)} visual tokens of a batch are NaN or infinite at layer {layer}: the numbers outgrow "
            "the weights' type, or the weights are damaged. Try another type (--dtype float32 or bfloat16), "
            "or leave the layer out (--layers)"
        )


@dataclass(frozen=True)
class LayerCalibration:
    """mean, mean_without_sinks: [d]; threshold: norm of a sink token; channels: float [d], 0 for sink channels."""

    mean: Tensor
    mean_without_sinks: Tensor
    threshold: float
    channels: Tensor
    has_sinks: bool

    def to(self, device: torch.device) -> LayerCalibration:
        """The same with its tensors on `device`."""
        moved = {name: getattr(self, name).to(device) for name in ("mean", "mean_without_sinks", "channels")}
        return replace(self, **moved)

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
        check_finite(norms, layer)
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
