"""What a training log says of the predictive loss: means since the last log, over all processes.

The numbers are those that `keepsight.training.trainer.PReTrainerMixin` names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from keepsight.pre.float32 import finest

if TYPE_CHECKING:
    from keepsight.pre.handle import Handle


class Curves:
    """Sums since the last log; on the device until read.

    Attributes:
        steps: optimizer steps since then, counted by who adds.
    """

    FIELDS = ("beside", "loss", "cosine", "gain", "paired", "images", "tokens", "skipped")

    def __init__(self) -> None:
        self.steps = 0
        self._sums: Tensor | None = None
        self._layers: tuple[int, ...] = ()
        self._weight: float | None = None

    def add(self, handle: Handle, beside: Tensor | float = 0.0) -> None:
        """The latest training forward, and a scalar to be summed beside it."""
        seen, summed = handle.seen, handle.loss_sum
        # Cosines of the layers, where there are several, stand behind the fields.
        self._layers = tuple(handle.layers) if len(handle.layers) > 1 else ()
        self._weight = handle.weight if handle.config.warmup_steps or handle.config.decay_steps else None
        device = handle.predictors.steps.device
        row = torch.zeros(len(self.FIELDS) + len(self._layers), dtype=finest(device), device=device)
        row[0] = beside
        if seen is not None and summed is not None:
            numbers = [summed, seen.cosine_sum, seen.gain_sum, seen.paired]
            row[1:5] = torch.stack([number.to(row) for number in numbers])
            row[5:8] = torch.tensor([seen.images, seen.tokens, seen.skipped], dtype=row.dtype)
            for number, layer in enumerate(self._layers, start=len(self.FIELDS)):
                row[number] = handle.seen_at(layer).cosine_sum
        self._sums = row if self._sums is None else self._sums + row

    def read(self, reduce: Callable[[Tensor], Tensor]) -> tuple[dict[str, float], float]:
        """The numbers to log, and the sum of what stood beside.

        Args:
            reduce: sums a tensor over all processes; each of them must call it.
        """
        assert self._sums is not None
        assert self.steps
        beside, loss, cosine, gain, paired, images, tokens, skipped, *by_layer = reduce(self._sums).tolist()
        logs = {}
        if images:
            logs["pre_loss"] = loss / images
            logs["pre_cosine"] = cosine / images
            for layer, value in zip(self._layers, by_layer, strict=True):
                logs[f"pre_cosine_{layer}"] = value / images
        if paired:
            logs["pre_margin"] = gain / paired
        logs |= {
            "pre_images": images / self.steps,
            "pre_tokens": tokens / self.steps,
            "pre_skipped": skipped / self.steps,
        }
        if self._weight is not None:
            logs["pre_weight"] = self._weight
        return logs, beside
