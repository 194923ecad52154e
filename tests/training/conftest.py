from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import LlavaProcessor

from tests.tiny_processors import make_llava


@pytest.fixture
def llava() -> LlavaProcessor:
    return make_llava()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three readable pictures: red.png, blue.png and wide.png (48 × 16)."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (16, 16), "red").save(folder / "red.png")
    Image.new("RGB", (16, 16), "blue").save(folder / "blue.png")
    noise = np.random.default_rng(0).integers(0, 255, (16, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "wide.png")
    return folder
