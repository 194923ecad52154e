"""What can be set about Predictive Regularization."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class PReConfig:
    """Predictive Regularization as the paper trains it; every default is the paper's (layer, λ) or named as ours.

    Attributes:
        layer: the decoder layer whose output predicts the anchor: 1 … L, "middle" (L // 2, the paper's) or "last".
        weight: λ of ``L = L_LM + λ L_PRe``. 0 leaves training exactly as it is without PRe.
        hidden: hidden width of the head; None = the decoder's width (ours: the paper gives none).
        observe: with ``weight=0``, train the head on *detached* states, so that the curves show what PRe would have
            seen while the model learns exactly as without it.
        head_lr: learning rate of the head; None = the model's.
        seed: of the head's own random generator; the global one is left untouched.

    Raises:
        ValueError: for a value out of range.
    """

    layer: int | str = "middle"
    weight: float = 0.5
    hidden: int | None = None
    observe: bool = False
    head_lr: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"weight is {self.weight}: λ must be a finite number ≥ 0 (the paper's is 0.5).")
        if self.observe and self.weight > 0:
            raise ValueError(
                f"observe=True with weight={self.weight}: observing means that PRe does not train the model. Set "
                "weight=0 to observe, or observe=False to train with PRe."
            )
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"hidden is {self.hidden}: the head's width must be ≥ 1, or None for the decoder's width.")
        if self.head_lr is not None and not (math.isfinite(self.head_lr) and self.head_lr > 0):
            raise ValueError(f"head_lr is {self.head_lr}: it must be > 0, or None for the model's learning rate.")

    @property
    def active(self) -> bool:
        """Whether the head is trained at all."""
        return self.weight > 0 or self.observe
