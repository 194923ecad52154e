"""What the prediction saw: numbers to log beside the loss, kept on the device until somebody reads them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from keepsight.pre.objective import image_means, other_image_index, token_cosines
from keepsight.vlm.grids import ImageTokens


@dataclass(frozen=True)
class Sight:
    """What one training forward showed. Means are over pictures, of detached values.

    Attributes:
        cosine: mean cosine between prediction and anchor; None without pictures.
        margin: how much higher the cosine is with a token's own anchor than with the anchor at the same position of
            another picture, over the tokens that have such a partner; None when no partner has been seen yet. The
            bare cosine rises with the direction that all visual tokens share; the margin does not.
        images: pictures that entered the loss.
        tokens: visual tokens that entered the loss.
        skipped: samples of the batch without a picture.
    """

    cosine: float | None
    margin: float | None
    images: int
    tokens: int
    skipped: int


@dataclass(frozen=True)
class Seen:
    """`Sight` before it is read: tensors stay on the device, because reading them makes a training step wait.

    Attributes:
        cosine_sum: sum over pictures of their mean cosine, scalar; ``gain_sum``: sum over paired tokens of own less
            other anchor's cosine, scalar; ``paired``: number of paired tokens, scalar.
        anchor_varies: whether the anchor differs between tokens, scalar bool.
        reaches_model: whether the state that predicts carries gradient to the model.
    """

    cosine_sum: Tensor
    gain_sum: Tensor
    paired: Tensor
    images: int
    tokens: int
    skipped: int
    had_pixels: bool
    anchor_varies: Tensor
    reaches_model: bool

    @classmethod
    def mean(cls, several: list[Seen]) -> Seen:
        """The mean over layers of one forward."""
        first = several[0]
        if len(several) == 1:
            return first
        return replace(
            first,
            cosine_sum=torch.stack([seen.cosine_sum for seen in several]).mean(),
            gain_sum=torch.stack([seen.gain_sum for seen in several]).mean(),
            anchor_varies=torch.stack([seen.anchor_varies for seen in several]).all(),
            reaches_model=any(seen.reaches_model for seen in several),
        )

    def read(self) -> Sight:
        paired = int(self.paired)
        return Sight(
            cosine=float(self.cosine_sum) / self.images if self.images else None,
            margin=float(self.gain_sum) / paired if paired else None,
            images=self.images,
            tokens=self.tokens,
            skipped=self.skipped,
        )


class Observer:
    """Compares predictions with their own anchors and with those of other pictures.

    Remembers the last picture's anchor, so that batches of one picture have a partner too.
    """

    def __init__(self) -> None:
        self._last: tuple[Tensor, ImageTokens] | None = None

    def memory(self) -> dict[str, Any] | None:
        """The last picture's anchor and tokens, as plain tensors and tuples."""
        if self._last is None:
            return None
        anchor, tokens = self._last
        fields = {name: getattr(tokens, name) for name in _FIELDS}
        return {"anchor": anchor, "grids": tokens.grids, **fields}

    def remember(self, memory: dict[str, Any] | None) -> None:
        """Take back what `memory` gave."""
        if memory is not None:
            tokens = ImageTokens(**{name: memory[name] for name in _FIELDS}, grids=memory["grids"])
            self._last = memory["anchor"], tokens

    def nothing(self, skipped: int, had_pixels: bool) -> Seen:
        """A batch without pictures."""
        zero = torch.zeros(())
        return Seen(zero, zero, zero, 0, 0, skipped, had_pixels, zero.bool(), False)

    @torch.no_grad()
    def look(
        self, prediction: Tensor, anchor: Tensor, tokens: ImageTokens, *, skipped: int, reaches_model: bool
    ) -> Seen:
        """Prediction and anchor ``[T, d]`` of a batch that holds pictures."""
        cosines = token_cosines(prediction, anchor)
        pool, places = anchor, tokens
        if tokens.n_images == 1 and self._last is not None:
            pool, places = _joined(anchor, tokens, *self._last)
        other = other_image_index(places)[: len(anchor)]
        paired = other >= 0
        gain = cosines[paired] - token_cosines(prediction[paired], pool[other[paired]])
        own = tokens.image == tokens.n_images - 1
        self._last = anchor[own], _selected(tokens, own)
        return Seen(
            cosine_sum=image_means(cosines, tokens.image, tokens.n_images).sum(),
            gain_sum=gain.sum(),
            paired=paired.sum(),
            images=tokens.n_images,
            tokens=len(anchor),
            skipped=skipped,
            had_pixels=True,
            anchor_varies=(anchor != anchor[0]).any(),
            reaches_model=reaches_model,
        )


_FIELDS = ("batch_row", "position", "image", "tile", "thumbnail", "row", "column")


def _selected(tokens: ImageTokens, own: Tensor) -> ImageTokens:
    """The last picture of a batch, as a batch of its own."""
    picture = ImageTokens(**{name: getattr(tokens, name)[own] for name in _FIELDS}, grids=tokens.grids[-1:])
    return replace(picture, image=torch.zeros_like(picture.image))


def _joined(anchor: Tensor, tokens: ImageTokens, more_anchor: Tensor, more: ImageTokens) -> tuple[Tensor, ImageTokens]:
    """Two batches as one, where the first lies: what a checkpoint gave back is on the CPU."""
    more = replace(more, image=more.image + tokens.n_images)
    pairs = {name: (getattr(tokens, name), getattr(more, name)) for name in _FIELDS}
    joined = {name: torch.cat([own, other.to(own.device)]) for name, (own, other) in pairs.items()}
    together = torch.cat([anchor, more_anchor.to(anchor.device)])
    return together, ImageTokens(**joined, grids=tokens.grids + more.grids)
