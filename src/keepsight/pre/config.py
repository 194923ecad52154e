"""What can be set about Predictive Regularization."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Anchor = Literal["pre_llm", "pre_projector", "encoder", "external", "moving_average"]
Control = Literal["other_image", "shuffled_patches", "random"]
Granularity = Literal["patch", "global", "relational"]
Distance = Literal["cosine", "mse", "infonce"]
Normalisation = Literal["none", "centred", "whitened"]
Layer = int | str


@dataclass(frozen=True)
class PReConfig:
    """Predictive Regularization as the paper trains it; every default is the paper's (layer, λ) or named as ours.

    Attributes:
        layer: the decoder layer whose output predicts the anchor: 1 … L, "middle" (L // 2, the paper's) or "last".
            A list of layers has a head each; the loss is their weighted mean.
        layer_weights: one a layer, scaled to sum to 1; None = equal.
        cascade: with several layers, each predicts the detached states of the one below it, and the lowest the anchor.
        weight: λ of ``L = L_LM + λ L_PRe``. 0 leaves training exactly as it is without PRe.
        warmup_steps: optimizer steps, counted over all stages, over which λ rises linearly from 0.
        decay_steps: optimizer steps, after the warm-up, over which λ falls linearly to 0; None = it stays.
        anchor: what is predicted. "pre_llm": the visual tokens at the decoder's input (the paper's). "pre_projector":
            the projector's input, averaged over the patches of a token. "encoder": the same from the encoder as it
            was when PRe was attached. "external": the patch features of `anchor_model`. "moving_average": the visual
            tokens at the decoder's input as a slowly moving average of encoder and projector makes them.
        anchor_model: for "external": a directory or hub id of a vision model of transformers.
        anchor_layer: for "external": which of its hidden states.
        anchor_decay: for "moving_average": share of the average that stays at an optimizer step.
        control: what the anchor is replaced by, to tell its information from the head's capacity. "other_image": the
            anchor at the same place of the picture before, over the pictures of all processes and on from batch to
            batch; "shuffled_patches": the picture's own, in another order; "random": constant random vectors, one a
            place.
        granularity: "patch" (the paper's), "global" (the mean over a picture) or "relational" (the cosines between the
            patches of a picture).
        distance: "cosine" (the paper's), "mse" (to the anchor standardised over its channels) or "infonce" (which of
            the picture's patches is it?).
        temperature: of "infonce".
        normalise: take what all visual tokens share off the anchor: "none" (the paper's), "centred" or "whitened"
            (running statistics of the training so far, over all processes).
        hidden: hidden width of the head; None = the decoder's width (ours: the paper gives none).
        observe: with ``weight=0``, train the head on *detached* states, so that the curves show what PRe would have
            seen while the model learns exactly as without it.
        head_lr: learning rate of the head; None = the model's.
        seed: of the head's own random generator; the global one is left untouched.

    Raises:
        ValueError: for a value out of range, or values that do not go together.
    """

    layer: Layer | tuple[Layer, ...] = "middle"
    layer_weights: tuple[float, ...] | None = None
    cascade: bool = False
    weight: float = 0.5
    warmup_steps: int = 0
    decay_steps: int | None = None
    anchor: Anchor = "pre_llm"
    anchor_model: str | None = None
    anchor_layer: int = -1
    anchor_decay: float = 0.999
    control: Control | None = None
    granularity: Granularity = "patch"
    distance: Distance = "cosine"
    temperature: float = 0.1
    normalise: Normalisation = "none"
    hidden: int | None = None
    observe: bool = False
    head_lr: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.layer, list):
            object.__setattr__(self, "layer", tuple(self.layer))
        if isinstance(self.layer_weights, list):
            object.__setattr__(self, "layer_weights", tuple(self.layer_weights))
        self._check_numbers()
        self._check_choices()
        if not self.layers:
            raise ValueError("layer is an empty list: give at least one layer, for example 'middle'.")
        if self.layer_weights is not None and (
            len(self.layer_weights) != len(self.layers)
            or not all(math.isfinite(w) and w > 0 for w in self.layer_weights)
        ):
            raise ValueError(
                f"layer_weights is {list(self.layer_weights)} for {len(self.layers)} layers: give one number > 0 for "
                "each layer, or None for equal weights."
            )
        if self.cascade and len(self.layers) < 2:
            raise ValueError("cascade=True needs at least two layers: each predicts the one below it.")
        if (self.anchor == "external") != (self.anchor_model is not None):
            raise ValueError(
                f"anchor is {self.anchor!r} and anchor_model is {self.anchor_model!r}: the anchor 'external' needs a "
                "model, and no other anchor takes one."
            )
        if self.distance == "infonce" and self.granularity == "global":
            raise ValueError(
                "distance 'infonce' tells the patches of a picture apart, and granularity 'global' has only one vector "
                "a picture: use 'patch' or 'relational', or another distance."
            )

    def _check_numbers(self) -> None:
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
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}: it must be 0 (no warm-up) or more.")
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ValueError(f"decay_steps is {self.decay_steps}: it must be 1 or more, or None for no decay.")
        if not 0 <= self.anchor_decay <= 1:
            raise ValueError(f"anchor_decay is {self.anchor_decay}: it must be a share from 0 to 1, such as 0.999.")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature is {self.temperature}: it must be a finite number > 0, such as 0.1.")

    def _check_choices(self) -> None:
        choices = {
            "anchor": Anchor,
            "control": Control,
            "granularity": Granularity,
            "distance": Distance,
            "normalise": Normalisation,
        }
        for name, kind in choices.items():
            value = getattr(self, name)
            if value not in get_args(kind) and not (name == "control" and value is None):
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, get_args(kind)))}.")

    @property
    def active(self) -> bool:
        """Whether the head is trained at all."""
        return self.weight > 0 or self.observe

    @property
    def layers(self) -> tuple[Layer, ...]:
        """`layer`, always as a tuple."""
        return self.layer if isinstance(self.layer, tuple) else (self.layer,)

    def weight_at(self, step: int) -> float:
        """λ after `step` optimizer steps."""
        rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.decay_steps is None:
            return self.weight * rise
        return self.weight * rise * min(1.0, max(0.0, 1 - (step - self.warmup_steps) / self.decay_steps))
