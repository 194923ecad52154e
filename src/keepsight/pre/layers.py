"""Which layers predict, and how much each counts."""

from __future__ import annotations

from keepsight.pre.config import PReConfig
from keepsight.vlm.view import Vlm


def resolve_layers(vlm: Vlm, config: PReConfig) -> tuple[list[int], list[float]]:
    """Layer indices, rising, and their shares of the loss.

    Raises:
        ValueError: for layer 0, a layer that does not exist, or one that is named twice.
    """
    found = [vlm.resolve_layer(layer) for layer in config.layers]
    if 0 in found:
        raise ValueError(
            "layer is 0, the decoder's input, which is the anchor itself: choose a layer from 1 to "
            f"{vlm.depth}, 'middle' or 'last'."
        )
    if len(set(found)) < len(found):
        raise ValueError(f"layer {list(config.layers)} names a layer twice (indices {found}); name each once.")
    weights = config.layer_weights or (1.0,) * len(found)
    pairs = sorted(zip(found, weights, strict=True))
    return [layer for layer, _ in pairs], [weight / sum(weights) for _, weight in pairs]
