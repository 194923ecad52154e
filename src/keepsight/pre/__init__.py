"""Predictive Regularization (PRe): the head, the loss, and how to attach them to a model."""

from keepsight.pre.attach import DeadLossError, Handle, attach, handle_of, param_groups
from keepsight.pre.config import PReConfig

__all__ = ["DeadLossError", "Handle", "PReConfig", "attach", "handle_of", "param_groups"]
