"""A gradient that enters in the middle of somebody else's backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _WithGradientOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (one,) = ctx.saved_tensors
        return gradients[0], one


def with_gradient_of(hidden: Tensor, loss: Tensor) -> Tensor:
    """`hidden` unchanged; when anything behind it is differentiated, `loss` (a scalar) is differentiated too.

    The gradient of `loss` has weight 1 whatever arrives from above: what divides the trainer's own loss (accumulation)
    must have divided `loss` before.
    """
    return _WithGradientOf.apply(hidden, loss)
