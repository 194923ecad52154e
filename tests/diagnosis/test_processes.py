"""`torchrun -m keepsight diagnose`: two processes find what one finds, and none waits for one that failed."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from keepsight.processes import Team
from keepsight.results import RunDirectory
from tests.diagnosis.world import plant_sinks, tiny_llava, write_world

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    for part in tiny_llava():
        part.save_pretrained(folder)
    return folder


def run(processes: int, model: Path, world: tuple[Path, Path], out: Path, *more: str) -> subprocess.CompletedProcess:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, "-m", "keepsight", "diagnose", str(model), "--images", str(world[0])]
    command += ["--masks", str(world[1]), "--out", str(out), "--batch-size", "3", "--device", "cpu", *more]
    return subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    """24 pictures in 8 batches, one of them broken; the second time with what the first has kept in part. Some batches
    have sinks, others none."""
    world = write_world(tmp_path, per_class=8)
    model, parts = tmp_path / "model", tiny_llava()
    plant_sinks(*parts, world[0])
    for part in parts:
        part.save_pretrained(model)
    (world[0] / "green" / "03.png").write_text("no picture")
    more = ("--skip-broken", "--metrics", "all", "--nulls", "random_weights")
    kept = ("--keep-features", str(tmp_path / "kept"))
    for processes, out, flags in ((1, "one", more), (2, "two", (*more, *kept))):
        done = run(processes, model, world, tmp_path / out, *flags)
        assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("report: ") == 1
    one, two = (RunDirectory.open(tmp_path / out) for out in ("one", "two"))
    rows, others = one.read_rows(), two.read_rows()
    assert len(rows) > 300
    assert [row.key for row in others] == [row.key for row in rows]
    for row, other in zip(rows, others, strict=True):
        assert (other.n, other.value is None) == (row.n, row.value is None), row
        if row.value is not None:
            assert other.value == pytest.approx(row.value, rel=1e-5, abs=1e-5), row
    assert two.info["counts"] == one.info["counts"]
    assert one.info["counts"]["skipped images"] == 1
    kept_tensors = [load_file(file) for file in (tmp_path / "kept" / "model").glob("batch-*")]
    assert {"bare" in tensors for tensors in kept_tensors} == {True, False}
    first, second = one.load().per_image, two.load().per_image
    assert second.images == first.images
    np.testing.assert_allclose(second.values, first.values, rtol=1e-4, atol=1e-5)

    for number in (1, 4, 7):
        (tmp_path / "kept" / "model" / f"batch-{number:07d}.safetensors").unlink()
    done = run(2, model, world, tmp_path / "again", *more, *kept)
    assert done.returncode == 0, done.stderr[-3000:]
    assert RunDirectory.open(tmp_path / "again").read_rows() == others


@pytest.mark.slow
def test_a_picture_that_one_process_cannot_read_stops_both(model, tmp_path):
    world = write_world(tmp_path, per_class=8)
    order = np.random.default_rng([0, 5]).permutation(24)[:8]  # the calibration's, which the first process runs
    index = next(i for i in range(24) if i not in order and i // 3 % 2 == 1)  # in a batch of the second process
    names = sorted(path for path in world[0].rglob("*.png"))
    names[index].write_text("no picture")
    done = run(2, model, world, tmp_path / "out")
    assert done.returncode != 0
    assert f"image '{names[index].relative_to(world[0])}' cannot be read" in done.stderr
    assert "process 1 of 2 stopped: ImageError" in done.stderr
    assert not (tmp_path / "out").exists()


def test_alone_nothing_is_exchanged():
    alone = Team()
    assert (alone.first, alone.everyone(3), alone.to_first(3), alone.from_first(3)) == (True, [3], [3], 3)
    with pytest.raises(ZeroDivisionError):
        alone.together(lambda: 1 // 0)
