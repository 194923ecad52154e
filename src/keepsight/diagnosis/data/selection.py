"""A part of the pictures: some classes of them, or so many."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from keepsight.diagnosis.data.pictures import Pictures


def select(pictures: Pictures, classes: Sequence[str] = (), limit: int | None = None, seed: int = 0) -> Pictures:
    """The pictures of these classes, and of them at most `limit`, in the order they had.

    Those within the limit are drawn with the seed, in turn from each class (of the label set "class", or the only
    one), so that every class is left with as many as the others, or all that it has; without labels, from all alike.

    Raises:
        ValueError: a class that is not there, classes without labels, or a limit below one.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; allowed: 1 or more, or None for all pictures")
    labels = pictures.labels.get("class")
    if labels is None and len(pictures.labels) == 1:
        (labels,) = pictures.labels.values()
    chosen = list(range(len(pictures)))
    if classes:
        if labels is None:
            raise ValueError(
                f"classes is {list(classes)}, but which class a picture has is not known: {pictures.unlabelled}"
                if not pictures.labels
                else f"classes is {list(classes)}, but there are the label sets {sorted(pictures.labels)}; name one "
                "of them 'class'"
            )
        known = sorted({label for label in labels if label is not None})
        if unknown := [name for name in classes if name not in known]:
            listed = ", ".join(known[:10]) + (", …" if len(known) > 10 else "")
            raise ValueError(f"classes holds {unknown[0]!r}, which no picture has; there are {listed}")
        chosen = [index for index in chosen if labels[index] in classes]
    if limit is not None and limit < len(chosen):
        order = np.random.default_rng([seed, 11]).permutation(len(chosen))
        turns: dict[str | None, int] = defaultdict(int)
        ranked = []
        for place, position in enumerate(order.tolist()):
            label = labels[chosen[position]] if labels is not None else None
            ranked.append((turns[label], place, chosen[position]))
            turns[label] += 1
        chosen = sorted(index for _, _, index in sorted(ranked)[:limit])
    return pictures if len(chosen) == len(pictures) else pictures.take(chosen)
