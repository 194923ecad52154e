"""A recipe of two stages trained by `keepsight train` over two processes that share the weights, and by one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from keepsight.training.record import read_curves
from tests.training.test_resume import ROOT

CONFIGS = ROOT / "recipes" / "accelerate"


def launch_arguments(name: str) -> list[str]:
    """What `accelerate launch` is given for a configuration of `recipes/accelerate`; any free port."""
    return ["--config_file", str(CONFIGS / f"{name}.yaml"), "--main_process_port", "0", "-m", "keepsight"]


def keepsight_train(made: Path, out: Path, *more: str, point: str = "never", **environment: str) -> None:
    """On two processes where there is an `environment` from `accelerate launch`, else on one; killed at `point`."""
    command = [sys.executable, "-m"]
    if environment:
        command += ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command += ["tests.training.killed", point, str(made), "--out", str(out), *more]
    command += ["--pre.control", "null"]  # its shuffles are each process's own
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) is (point == "never"), done.stderr[-3000:]


def assert_trained_alike(folder: Path, expected: str, *names: str) -> None:
    """Twice six steps in each run: the curves of the run `expected`, and its model, which transformers loads whole."""
    curves = [row for row in read_curves(folder / expected) if "lm_loss" in row]
    weights = load_file(folder / expected / "model" / "model.safetensors")
    for name in names:
        found = [row for row in read_curves(folder / name) if "lm_loss" in row]
        assert [row["step"] for row in found] == [*range(1, 7)] * 2
        for one, other in zip(curves, found, strict=True):
            for key in ("lm_loss", "pre_loss", "pre_images"):
                assert other.get(key) == pytest.approx(one.get(key), abs=5e-5), (name, one["step"], key)
        _, info = AutoModelForImageTextToText.from_pretrained(folder / name / "model", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        written = load_file(folder / name / "model" / "model.safetensors")
        assert written.keys() == weights.keys()
        assert all(torch.allclose(written[key], weights[key], atol=2e-4) for key in weights)
