"""Object masks: what is read as one, and the parts of a semantic mask."""

import numpy as np
import pytest
from PIL import Image

from keepsight.diagnosis.data.masks import components, read_mask
from keepsight.images import ImageError


def test_masks_are_index_pictures():
    assert read_mask(Image.new("P", (2, 3), 7), "a").tolist() == [[7, 7]] * 3
    with pytest.raises(ValueError, match=r"the mask of 'a' is a RGB picture; expected one channel \(mode L or P\)"):
        read_mask(Image.new("RGB", (2, 3)), "a")
    with pytest.raises(
        ValueError, match=r"must be a \[H, W\] array of values 0 … 255; got shape \(2, 2\), values 0 … 300"
    ):
        read_mask(np.array([[0, 300], [1, 2]]), "a")
    with pytest.raises(ValueError, match=r"holds float32 values that are not whole numbers; .* cut it at a threshold"):
        read_mask(np.array([[0.5, 1]], dtype=np.float32), "a")
    with pytest.raises(ValueError, match="not whole numbers"):
        read_mask(np.array([[np.nan]]), "a")
    assert read_mask(np.array([[0.0, 2.0]]), "a").tolist() == [[0, 2]]
    assert read_mask(np.array([[False, True]]), "a").tolist() == [[0, 1]]


def test_components_by_hand():
    mask = np.array(
        [
            [5, 5, 0, 5],
            [0, 5, 0, 0],
            [7, 0, 5, 255],  # the 5 touches the one above by its corner
        ],
        dtype=np.uint8,
    )
    assert components(mask).tolist() == [[1, 1, 0, 2], [0, 1, 0, 0], [3, 0, 1, 255]]


def test_broken_masks_are_named(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ImageError, match=r"the mask of 'a' cannot be read \(UnidentifiedImageError"):
        read_mask(tmp_path / "a.png", "a")
