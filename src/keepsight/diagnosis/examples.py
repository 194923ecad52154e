"""A few of the diagnosed pictures, for the report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from keepsight.diagnosis.data.pictures import Pictures
from keepsight.results import Example
from keepsight.results.maps import SimilarityMap

EXAMPLES, EXAMPLE_SIDE = 6, 448


def choose_examples(pictures: Pictures, done: Sequence[int]) -> list[int]:
    """A few pictures, evenly spread over the set; those with masks where there are any."""
    masked = [index for index in done if pictures.items[index].mask is not None] or list(done)
    return sorted({masked[round(i)] for i in np.linspace(0, len(masked) - 1, min(EXAMPLES, len(masked)))})


def open_examples(
    pictures: Pictures, chosen: Sequence[int], split_components: bool, maps: Sequence[SimilarityMap | None]
) -> list[Example]:
    """These pictures at the report's size, each with its similarity map."""
    found = []
    for index, similar in zip(chosen, maps, strict=True):
        image, mask = pictures.items[index].open(split_components)
        image.thumbnail((EXAMPLE_SIDE, EXAMPLE_SIDE))
        if mask is not None:
            mask = np.asarray(Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST))
        caption = ", ".join(f"{values[index]}" for values in pictures.labels.values() if values[index] is not None)
        found.append(Example(image, mask, pictures.items[index].name, caption, similar))
    return found
