"""Classes and limits: which pictures stay, in which order."""

from collections import Counter

import pytest

from keepsight.diagnosis.data.pictures import Picture, Pictures
from keepsight.diagnosis.data.selection import select


def pictures(**counts):
    labels = [name for name, count in counts.items() for _ in range(count)]
    return Pictures([Picture(f"{i}", None) for i in range(len(labels))], {"class": labels})


def test_classes_keep_order_and_labels():
    found = select(pictures(cat=2, dog=2, fox=1), ["fox", "cat"])
    assert [item.name for item in found.items] == ["0", "1", "4"]
    assert found.labels == {"class": ["cat", "cat", "fox"]}
    with pytest.raises(ValueError, match="classes holds 'cow', which no picture has; there are cat, dog"):
        select(pictures(cat=2, dog=2), ["cat", "cow"])
    with pytest.raises(ValueError, match="which class a picture has is not known: no labels were given"):
        select(Pictures([Picture("0", None)]), ["cat"])


def test_a_limit_is_shared_evenly_by_the_classes_and_seeded():
    world = pictures(cat=20, dog=3, fox=20)
    found = select(world, limit=13)
    assert Counter(found.labels["class"]) == {"cat": 5, "dog": 3, "fox": 5}
    names = [int(item.name) for item in found.items]
    assert names == sorted(names)
    assert select(world, limit=13) == found
    assert select(world, limit=13, seed=1) != found
    assert select(world, limit=99) is world
    assert len(select(Pictures(world.items), limit=4)) == 4
    with pytest.raises(ValueError, match="limit is 0; allowed: 1 or more"):
        select(world, limit=0)
