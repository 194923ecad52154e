"""Whoever's training loop it is: the end of an optimizer step is where running averages and λ move."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from keepsight.pre.handle import Handle

_live: weakref.WeakSet[Handle] = weakref.WeakSet()


def watch(handle: Handle) -> None:
    """Call `handle.stepped()` after every step of an optimizer that holds its head."""
    _live.add(handle)


def forget(handle: Handle) -> None:
    """No longer."""
    _live.discard(handle)


def _after_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for handle in list(_live):
        if not handle.config.active:
            continue
        own = {id(parameter) for parameter in handle.parameters()}
        if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            handle.stepped()


register_optimizer_step_post_hook(_after_optimizer_step)
