"""Similarity maps of a few pictures: which patches does a patch look like, layer by layer?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from keepsight.diagnosis.collect.batches import Loader
from keepsight.diagnosis.collect.passes import forward
from keepsight.diagnosis.metrics.lens import Readout, top_tokens
from keepsight.results.maps import COMPONENTS, SimilarityMap, compress
from keepsight.vlm import Vlm
from keepsight.vlm.geometry import patch_centres
from keepsight.vlm.grids import resampled


def similarity_maps(
    vlm: Vlm,
    loader: Loader,
    indices: Sequence[int],
    layers: Sequence[int],
    components: int = COMPONENTS,
    *,
    read: Readout | None = None,
) -> list[SimilarityMap | None]:
    """A map for each of these pictures, from a forward of each alone; None where visual tokens stand for no place.

    Args:
        read: the lens, to also keep what each token would say.
    """
    if resampled(vlm.config):
        return [None] * len(indices)
    found: list[SimilarityMap | None] = []
    for index in indices:
        (decoded,) = loader.batches([index], masks=False)
        packed: list[tuple[np.ndarray, float, float]] = []
        said: list[np.ndarray] = []

        def take(layer: int, tokens: Tensor, packed: list = packed, said: list = said) -> None:
            packed.append(compress(tokens.float().cpu().numpy(), components))
            if read is not None:
                said.append(top_tokens(tokens, read).cpu().numpy())

        with torch.no_grad():
            forward(vlm, decoded, layers, take)
        codes, error, worst = zip(*packed, strict=True)
        image, _ = loader.pictures[index].open()
        tokens = decoded.tokens
        found.append(
            SimilarityMap(
                layers=np.array(layers, dtype=np.int16),
                codes=np.stack(codes),
                error=np.array(error, dtype=np.float32),
                worst=np.array(worst, dtype=np.float32),
                centres=patch_centres(loader.processor, vlm, image.size, loader.prompt).numpy(),
                tile=tokens.tile.cpu().numpy().astype(np.int16),
                row=tokens.row.cpu().numpy().astype(np.int16),
                column=tokens.column.cpu().numpy().astype(np.int16),
                thumbnail=tokens.thumbnail.cpu().numpy(),
                **_spoken(said, lambda token: loader.tokenizer.decode([token])),
            )
        )
    return found


def _spoken(said: Sequence[np.ndarray], decode: Callable[[int], str]) -> dict[str, np.ndarray]:
    """Ids at each layer → the fields `words` and `top`: a short table, and places in it."""
    if not said:
        return {}
    ids, top = np.unique(np.stack(said), return_inverse=True)
    words = np.array([decode(int(token)).replace("\0", "") for token in ids], dtype=str)
    return {"words": words, "top": top.reshape(len(said), -1).astype(np.int32)}
