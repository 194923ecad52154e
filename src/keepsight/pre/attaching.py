"""Attach Predictive Regularization to any model, and find it again."""

from __future__ import annotations

from typing import Any

from torch import nn

from keepsight.pre.config import PReConfig
from keepsight.pre.handle import HANDLE, Handle
from keepsight.vlm.view import unwrap


def attach(model: nn.Module, config: PReConfig | None = None, *, inject: bool = False) -> Handle:
    """Attach Predictive Regularization to a model, in place.

    The model computes exactly what it did; ``model(**batch).loss`` is untouched. Add ``handle.loss`` to it, or train
    with `PReTrainerMixin`. Attach before the optimizer and before DDP are built; with PEFT, either after wrapping or
    before, with `Handle.peft`.

    Args:
        model: any image-text-to-text model of transformers.
        config: None for the paper's settings.
        inject: for trainers that cannot be changed: the gradient of ``λ · L_PRe`` enters at the layer during the
            ordinary backward, so that nothing need be added to the loss; give the handle to the trainer as a callback.
            L_PRe is then a mean of the micro-batches' means, which equals the mean over the global batch when every
            micro-batch holds the same number of pictures. Not with fp16 loss scaling.

    Raises:
        ValueError: for a family without visual tokens in the decoder, a layer that does not exist, or a second attach;
            at the forward, for one process on several GPUs (`nn.DataParallel`).
    """
    return Handle(model, config or PReConfig(), inject=inject)


def handle_of(model: nn.Module) -> Handle | None:
    """The handle attached to a model (also through PEFT, DDP or `torch.compile`), or None."""
    base = unwrap(model)
    return getattr(getattr(base, "base_model", base), HANDLE, None)


def param_groups(model: nn.Module, *, head_lr: float | None = None) -> list[dict[str, Any]]:
    """Two optimizer groups of what is trainable: the model's parameters, and the head's.

    Args:
        model: a model with PRe attached.
        head_lr: learning rate of the head; None = that of `PReConfig`, or else the optimizer's default.

    Raises:
        ValueError: when nothing is attached.
    """
    handle = handle_of(model)
    if handle is None:
        raise ValueError("nothing is attached to this model: call keepsight.attach(model, PReConfig()) first.")
    head = {id(parameter) for parameter in handle.parameters()}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.requires_grad and id(p) not in head]},
        {"params": [p for p in handle.parameters() if p.requires_grad]},
    ]
    rate = head_lr if head_lr is not None else handle.config.head_lr
    if rate is not None:
        groups[1]["lr"] = rate
    return [group for group in groups if group["params"]]
