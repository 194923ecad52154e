"""Predictive Regularization (PRe): the head, the loss, and how to attach them to a model."""

from keepsight.pre.attach import Handle, attach, handle_of, param_groups
from keepsight.pre.config import PReConfig
from keepsight.pre.life import DeadLossError

__all__ = ["DeadLossError", "Handle", "PReConfig", "attach", "handle_of", "param_groups"]
