"""Taking off the anchor what all visual tokens share.

Visual tokens have a large mean direction in common, so that a cosine with the plain anchor nears 1 before a head has
learned to tell one patch from another. What is left after centring or whitening is what distinguishes patches. Ours.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from keepsight.pre.float32 import Float32Module, finest

MOMENTUM = 0.99  # of the running statistics, once there are many steps
SHRINKAGE = 0.01  # share of the mean variance added to every direction before whitening
REFRESH = 20  # optimizer steps between two decompositions of the covariance


class AnchorStatistics(Float32Module):
    """Running mean (and covariance) of a target over the optimizer steps so far.

    What a step sees enters at its end, so that the micro-batches and processes of one step share the same statistics
    and gradient accumulation stays exact; the first step sees the plain anchor. Buffers, hence in every checkpoint.

    Args:
        width: d of the target.
        whiten: keep the covariance as well.
    """

    mean: Tensor
    covariance: Tensor
    transform: Tensor
    seen: Tensor

    def __init__(self, width: int, *, whiten: bool) -> None:
        super().__init__()
        self.whiten = whiten
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(width))
        if whiten:
            self.register_buffer("covariance", torch.zeros(width, width))
            self.register_buffer("transform", torch.eye(width))
        self._count: Tensor | None = None
        self._first: Tensor | None = None
        self._second: Tensor | None = None

    def forward(self, target: Tensor) -> Tensor:
        """``[T, d]`` → ``[T, d]`` float32, centred or whitened by the steps before this one."""
        centred = target.float() - self.mean  # before the first step: minus zero, times one
        with torch.autocast(target.device.type, enabled=False):
            return centred @ self.transform if self.whiten else centred

    @torch.no_grad()
    def collect(self, target: Tensor) -> None:
        """Remember ``[T, d]`` until the step ends."""
        x = target.to(finest(target.device))
        if self._count is None:
            self._count = x.new_zeros(())
            self._first = x.new_zeros(x.shape[1])
            self._second = x.new_zeros(x.shape[1], x.shape[1]) if self.whiten else None
        assert self._first is not None
        self._count += len(x)
        self._first += x.sum(dim=0)
        if self._second is not None:
            self._second += x.T @ x

    @torch.no_grad()
    def commit(self) -> None:
        """End of an optimizer step: take in what it saw, over all processes (each must call this)."""
        width = len(self.mean)
        count, first = self._count, self._first
        if count is None or first is None:  # a process that saw no picture
            sums = self.mean.to(finest(self.mean.device))
            count, first = sums.new_zeros(()), sums.new_zeros(width)
        second = self._second
        if self.whiten and second is None:
            second = first.new_zeros(width, width)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for value in (count, first, second):
                if value is not None:
                    dist.all_reduce(value)
        self._count = self._first = self._second = None
        if float(count) == 0:
            return
        self.seen += 1
        share = max(1 - MOMENTUM, 1 / int(self.seen))  # the plain average at first
        mean = first / count
        self.mean.lerp_(mean.float(), share)
        if second is not None:
            covariance = second / count - mean[:, None] * mean[None, :]
            self.covariance.lerp_(covariance.float(), share)
            if int(self.seen) % REFRESH == 1 or int(self.seen) < 5:
                values, vectors = torch.linalg.eigh(self.covariance.to(finest(self.covariance.device)))
                floor = SHRINKAGE * values.clamp(min=0).mean().clamp(min=1e-12)
                scaled = vectors / (values.clamp(min=0) + floor).sqrt()
                self.transform.copy_((scaled @ vectors.T).float())
