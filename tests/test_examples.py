"""Every example runs as a user would run it: from any folder, offline."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("[0-9]*.py"))


def run(example: Path, folder: Path, processes: int = 1) -> str:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, *launch, str(example)],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_examples_and_each_is_short():
    assert len(EXAMPLES) == 6
    assert all(len(example.read_text(encoding="utf-8").splitlines()) < 80 for example in EXAMPLES)


@pytest.mark.slow
def test_diagnose(tmp_path):
    out = run(EXAMPLES[0], tmp_path)
    assert out.count("texture") >= 3
    assert (tmp_path / "runs" / "example-diagnosis.html").stat().st_size > 1_000_000


@pytest.mark.slow
def test_plain_loop(tmp_path):
    out = run(EXAMPLES[1], tmp_path)
    steps = [line.split(":")[0] for line in out.splitlines() if line.startswith("step")]
    assert steps == [f"step {i}" for i in range(4)]
    assert (tmp_path / "runs" / "example-attached" / "model.safetensors").is_file()


@pytest.mark.slow
def test_hf_trainer(tmp_path):
    out = run(EXAMPLES[2], tmp_path)
    steps = out.splitlines()[-4:]
    assert all("'pre_cosine'" in step and "'pre_images': 8.0" in step for step in steps)


@pytest.mark.slow
def test_trainer_that_stays_as_it_is(tmp_path):
    out = run(EXAMPLES[3], tmp_path).splitlines()[-1]
    assert out.startswith("cosine ")
    assert float(out.split("moved by ")[1].split()[0]) > 1e-3


@pytest.mark.slow
def test_accelerate_loop(tmp_path):
    """Two micro-batches on each of two processes train like four on one."""
    one, two = (run(EXAMPLES[4], tmp_path / name, count) for name, count in (("one", 1), ("two", 2)))
    curves = [[line.split("  cosine")[0] for line in out.splitlines() if line.startswith("step")] for out in (one, two)]
    assert len(curves[0]) == 4
    assert curves[0] == curves[1]
    assert (tmp_path / "two" / "runs" / "example-accelerate" / "model.safetensors").is_file()


@pytest.mark.slow
def test_trl(tmp_path):
    pytest.importorskip("trl")
    steps = run(EXAMPLES[5], tmp_path).splitlines()[-4:]
    assert all("'pre_cosine'" in step and "'pre_images': 8.0" in step for step in steps)
