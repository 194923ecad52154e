"""Two processes train like one: DDP in HF Trainer and in a plain loop, FSDP2; pictures on one process only."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(processes: int, mode: str, out: Path, *settings: str, **environment: str) -> dict:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = (
        [*launch, "-m", "tests.training.worker"] if processes > 1 else [sys.executable, "-m", "tests.training.worker"]
    )
    command += [mode, str(out), *settings]
    env = {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("trainer", ()),
        ("trainer", ('normalise="whitened"', 'granularity="relational"', "layer=[1, 3]", "warmup_steps=2")),
        ("trainer", ('control="other_image"', 'distance="mse"')),
        ("trainer", ('anchor="moving_average"', "anchor_decay=0.5")),
        ("trainer-images", ('normalise="centred"',)),
        ("trainer-images", ('control="other_image"',)),
        # Under checkpointing `Trainer` lets DDP not look for parameters that a process without pictures does not use.
        ("trainer-images", ("gradient_checkpointing=true", 'learns=["projector","language_model"]')),
        ("trainer-images", ("gradient_checkpointing=true", 'learns=["projector"]', "weight=0")),
        ("trainer-images", ('learns=["projector"]', "weight=0")),
        ("injected", ()),
        ("injected-images", ()),
        ("loop", ()),
        ("fsdp", ()),
        ("fsdp-images", ()),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "paper",
)
def test_two_processes_train_like_one(tmp_path, mode, settings):
    one = run(1, mode, tmp_path / "one.json", *settings)
    two = run(2, mode, tmp_path / "two.json", *settings)
    assert len(one["log"]) == len(two["log"]) == 3
    for single, double in zip(one["log"], two["log"], strict=True):
        # `loss` is rounded by HF; the margin pairs pictures within a process, hence other ones.
        for name in single:
            if name.startswith(("lm_loss", "pre")) and name != "pre_margin":
                assert double[name] == pytest.approx(single[name], abs=2e-5), name
    for name in one["parameters"].keys() & two["parameters"].keys():
        assert two["parameters"][name] == pytest.approx(one["parameters"][name], abs=2e-4), name


@pytest.mark.slow
def test_a_process_without_pictures_takes_part_in_another_ones_type(tmp_path):
    """bfloat16 weights, and a control that asks all processes for their anchors."""
    setting = ('control="other_image"', 'dtype="bfloat16"')
    one, two = (run(n, "trainer-images", tmp_path / f"{n}.json", *setting) for n in (1, 2))
    for single, double in zip(one["log"], two["log"], strict=True):
        assert double["pre_images"] == single["pre_images"] > 0
        assert double["pre_loss"] == pytest.approx(single["pre_loss"], abs=0.02)
