"""Similarity maps of a few pictures: which patches does a patch look like, layer by layer?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from keepsight.diagnosis.batches import Loader
from keepsight.diagnosis.passes import forward
from keepsight.results.maps import COMPONENTS, SimilarityMap, compress
from keepsight.vlm import Vlm
from keepsight.vlm.geometry import patch_centres
from keepsight.vlm.grids import resampled


def similarity_maps(
    vlm: Vlm, loader: Loader, indices: Sequence[int], layers: Sequence[int], components: int = COMPONENTS
) -> list[SimilarityMap | None]:
    """A map for each of these pictures, from a forward of each alone; None where visual tokens stand for no place."""
    if resampled(vlm.config):
        return [None] * len(indices)
    found: list[SimilarityMap | None] = []
    for index in indices:
        (decoded,) = loader.batches([index], masks=False)
        packed: list[tuple[np.ndarray, np.ndarray, float, float]] = []

        def take(layer: int, tokens: Tensor, packed: list = packed) -> None:
            packed.append(compress(tokens.float().cpu().numpy(), components))

        with torch.no_grad():
            forward(vlm, decoded, layers, take)
        codes, scales, error, worst = zip(*packed, strict=True)
        image, _ = loader.pictures[index].open()
        tokens = decoded.tokens
        found.append(
            SimilarityMap(
                layers=np.array(layers, dtype=np.int16),
                codes=np.stack(codes),
                scales=np.stack(scales),
                error=np.array(error, dtype=np.float32),
                worst=np.array(worst, dtype=np.float32),
                centres=patch_centres(loader.processor, vlm, image.size, loader.prompt).numpy(),
                tile=tokens.tile.cpu().numpy().astype(np.int16),
                row=tokens.row.cpu().numpy().astype(np.int16),
                column=tokens.column.cpu().numpy().astype(np.int16),
            )
        )
    return found
