"""A run killed anywhere, also in the middle of writing a checkpoint, goes on bit for bit as if it had not been."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from keepsight.training.checkpoints import WEIGHTS, latest
from keepsight.training.config import TrainConfig
from keepsight.training.record import read_curves, reopen, start
from tests.tiny_processors import save_llava
from tests.training.test_conversations import entry

ROOT = Path(__file__).resolve().parents[2]


def recipe(folder: Path, pictures: Path, **more: Any) -> Path:
    """Single pictures, so that the margin needs the one before; whitening, a schedule, two layers, a random control."""
    entries = [entry("<image>\nwhat color ?", color, image=f"{color}.png") for color in ("red", "blue")] * 4
    entries += [entry("hello", "world"), entry("<image> <image>", "circle", image=["red.png", "blue.png"])]
    (folder / "data.json").write_text(json.dumps(entries), encoding="utf-8")
    settings = {
        "model": {"path": str(save_llava(folder / "start"))},
        "data": {"conversations": str(folder / "data.json"), "image_folder": str(pictures)},
        "projector": {"batch_size": 2, "micro_batch_size": 1, "max_steps": 6, "lr": 1e-2},
        "full": {
            "train": ["projector", "language_model"],
            "batch_size": 2,
            "micro_batch_size": 1,
            "max_steps": 6,
            "lr": 3e-3,
        },
        "pre": {"layer": [1, 3], "normalise": "whitened", "warmup_steps": 8, "control": "shuffled_patches"},
        "save_steps": 2,
        "trainer": {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1},
        **more,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder / "recipe.yaml"


def run(module: str, *arguments: object, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr


def started(folder: Path, **more: Any) -> tuple[Path, Path]:
    """A recipe, and the run of it that nobody stopped."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for color in ("red", "blue"):
        Image.new("RGB", (16, 16), color).save(pictures / f"{color}.png")
    made = recipe(folder, pictures, **more)
    run("keepsight", "train", made, "--out", folder / "whole")
    return made, folder / "whole"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, Path]:
    return started(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> tuple[Path, Path]:
    """With dropout, whose random state counts, and matrices that are drawn between the stages."""
    return started(tmp_path_factory.mktemp("resume"), lora={"rank": 4, "dropout": 0.25})


def content(path: Path) -> dict[str, Any]:
    """All that a run leaves behind."""
    last = path / "stages" / "full" / "checkpoint-6"
    return {
        "model": load_file(path / "model" / "model.safetensors"),
        "with head": load_file(last / WEIGHTS),
        "optimizer": torch.load(last / "optimizer.pt", weights_only=True)["state"],
        "random state": torch.load(last / "rng_state.pth", weights_only=False)["cpu"],
        "curves": read_curves(path),
    }


def same(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(same(a, b) for a, b in zip(one, two, strict=True))
    return torch.equal(one, two) if torch.is_tensor(one) else one == two


@pytest.mark.slow
@pytest.mark.parametrize(
    "point",
    [
        "step:projector:1",  # before the first checkpoint
        "step:projector:5",
        "projector:4:weights",
        "projector:6:mark",  # the last of its stage
        "step:full:1",  # after a whole stage
        "full:2:optimizer",
        "full:4:removal",
        "step:full:5",
        "full:6:whole",  # the last checkpoint of the run, before its curves are written
        "export",
    ],
)
def test_killed_and_resumed_is_uninterrupted(world, tmp_path, point):
    goes_on(world, tmp_path / "run", point)


@pytest.mark.slow
@pytest.mark.parametrize("point", ["step:full:1", "full:4:optimizer", "step:full:5", "export"])
def test_killed_and_resumed_is_uninterrupted_with_lora(adapted, tmp_path, point):
    goes_on(adapted, tmp_path / "run", point)
    one, two = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (adapted[1], tmp_path / "run"))
    assert same(one, two)
    assert any("lora_A" in name for name in one)


def goes_on(world: tuple[Path, Path], out: Path, point: str) -> None:
    """Kill a run, resume it, and compare all that it leaves behind with the run that nobody stopped."""
    made, whole = world
    run("tests.training.killed", point, made, "--out", out, code=-signal.SIGKILL)
    assert not json.loads((out / "run.json").read_text()).get("finished")
    run("keepsight", "train", made, "--out", out, "--resume")
    expected, got = content(whole), content(out)
    for name, value in expected.items():
        assert same(value, got[name]), name
    assert any("keepsight_head.heads.3" in name for name in got["with head"])
    assert any("pre_margin" in row for row in got["curves"])


@pytest.mark.slow
def test_resume_starts_finishes_and_refuses(world, tmp_path):
    made, whole = world
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    run("keepsight", "train", made, "--out", whole, "--resume")  # finished: nothing to do
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()} == before
    said = run("keepsight", "train", made, "--out", whole, "--resume", "--pre.weight", "0.25", code=2)
    assert "started with another configuration (pre.weight: 0.5, now 0.25)" in " ".join(said.split())
    said = run("keepsight", "train", made, "--out", whole, code=2)
    assert "already holds a run" in " ".join(said.split())


def test_a_half_is_no_checkpoint(tmp_path):
    whole, half = tmp_path / "checkpoint-2", tmp_path / "checkpoint-10"
    for folder in (whole, half):
        folder.mkdir()
        (folder / "a").write_bytes(b"1234")
        (folder / "complete.json").write_text(json.dumps({"step": 1, "files": {"a": 4}}))
    assert latest(tmp_path) == half
    (half / "a").write_bytes(b"12")
    assert latest(tmp_path) == whole
    (whole / "complete.json").unlink()
    assert latest(tmp_path) is None


def test_another_number_of_processes_is_refused(setting, monkeypatch):
    config = TrainConfig(**setting)
    monkeypatch.setenv("WORLD_SIZE", "2")
    start(config)
    assert reopen(config).info["processes"] == 2
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="was started with 2 processes and cannot go on with 4: give as many"):
        reopen(config)


@pytest.mark.slow
def test_two_processes_killed_and_resumed_are_uninterrupted(tmp_path, pictures):
    """Each remembers its own last picture. The encoder learns, whose last layer nobody reads, under checkpointing."""
    full = {"train": ["projector", "language_model", "encoder"], "batch_size": 2, "micro_batch_size": 1, "max_steps": 4}
    trainer = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "gradient_checkpointing": True}
    first = {"batch_size": 2, "micro_batch_size": 1, "max_steps": 2}
    made = recipe(tmp_path, pictures, projector=first, full=full, trainer=trainer)
    noise = np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), dtype=np.uint8)
    for number, picture in enumerate(noise):  # no two alike, one in each sample
        Image.fromarray(picture).save(pictures / f"{number}.png")
    entries = [entry("<image>\nwhat color ?", "red", image=f"{number}.png") for number in range(len(noise))]
    (tmp_path / "data.json").write_text(json.dumps(entries), encoding="utf-8")
    two = ("--standalone", "--nproc_per_node=2", "-m", "tests.training.killed")
    whole, out = tmp_path / "whole", tmp_path / "run"
    run("torch.distributed.run", *two, "never", made, "--out", whole)
    run("torch.distributed.run", *two, "step:full:3", made, "--out", out, code=1)
    run("torch.distributed.run", *two, "never", made, "--out", out, "--resume")
    expected = read_curves(whole)
    assert [row["step"] for row in expected if "pre_margin" in row][-2:] == [3, 4]
    assert read_curves(out) == expected
    one, again = (load_file(path / "model" / "model.safetensors") for path in (whole, out))
    assert same(one, again)
