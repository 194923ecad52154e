"""Predictive Regularization (PRe): the head, the loss, and how to attach them to a model."""

from typing import TYPE_CHECKING

from keepsight._lazy import lazy
from keepsight.pre.config import PReConfig

if TYPE_CHECKING:
    from keepsight.pre.attaching import attach, handle_of, param_groups
    from keepsight.pre.handle import Handle
    from keepsight.pre.life import DeadLossError

__getattr__ = lazy(
    __name__,
    {
        "DeadLossError": "keepsight.pre.life",
        "Handle": "keepsight.pre.handle",
        "attach": "keepsight.pre.attaching",
        "handle_of": "keepsight.pre.attaching",
        "param_groups": "keepsight.pre.attaching",
    },
)
__all__ = ["DeadLossError", "Handle", "PReConfig", "attach", "handle_of", "param_groups"]
