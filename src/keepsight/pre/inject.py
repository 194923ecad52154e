"""A gradient that enters in the middle of somebody else's backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _WithGradientOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(torch.full_like(loss, scale))
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (scale,) = ctx.saved_tensors
        return gradients[0], scale, None


def with_gradient_of(hidden: Tensor, loss: Tensor) -> Tensor:
    """`hidden` unchanged; when anything behind it is differentiated, `loss` (a scalar) is differentiated too.

    The gradient of `loss` has weight 1 whatever arrives from above: what divides the trainer's own loss (accumulation)
    must have divided `loss` before.
    """
    return _WithGradientOf.apply(hidden, loss, 1.0)


def connected(hidden: Tensor, loss: Tensor) -> Tensor:
    """`hidden` unchanged, with `loss` in its graph at weight zero.

    DistributedDataParallel looks from a model's outputs for the parameters that this forward used; a loss that travels
    beside the outputs must be seen from them, or its parameters are taken for unused.
    """
    return _WithGradientOf.apply(hidden, loss, 0.0)


def connect(output: Any, loss: Tensor) -> None:
    """Give a core's output, in place, what `connected` gives a tensor."""
    for name in ("last_hidden_state", "logits", "loss"):  # the latter two where the core has the LM head
        if getattr(output, name, None) is not None:
            setattr(output, name, connected(getattr(output, name), loss))
