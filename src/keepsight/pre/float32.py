"""Precision: modules whose tensors stay float32 whatever is cast around them, and what running sums are kept in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


def finest(device: torch.device) -> torch.dtype:
    """What running sums are kept in: float64, which Apple's GPUs lack."""
    return torch.float32 if device.type == "mps" else torch.float64


class Float32Module(nn.Module):
    """What moves the module (`.to(device)`) moves its tensors; what casts it (`.half()`, `.to(bfloat16)`) does not."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_float32, recurse)
