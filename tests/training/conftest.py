import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import LlavaProcessor

from keepsight.training.config import DataConfig, ModelConfig, StageConfig
from tests.tiny_processors import make_llava, save_llava
from tests.training.test_conversations import entry

STEPS = StageConfig(batch_size=4, micro_batch_size=2, max_steps=3, lr=1e-2)
FULL = StageConfig(train=("projector", "language_model"), batch_size=4, max_steps=3, lr=3e-3)
QUIET = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1}


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


@pytest.fixture
def setting(tmp_path: Path, pictures: Path) -> dict[str, Any]:
    entries = [entry("<image>\nwhat color ?", color, image=f"{color}.png") for color in ("red", "blue")] * 4
    entries += [entry("hello", "world"), entry("<image> <image>", "circle", image=["red.png", "blue.png"])]
    (tmp_path / "data.json").write_text(json.dumps(entries), encoding="utf-8")
    return {
        "model": ModelConfig(path=str(save_llava(tmp_path / "start"))),
        "data": DataConfig(conversations=str(tmp_path / "data.json"), image_folder=str(pictures), cache_megabytes=10),
        "out": str(tmp_path / "run"),
        "projector": STEPS,
        "full": FULL,
        "trainer": QUIET,
    }
