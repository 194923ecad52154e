"""Features kept in a folder: stopped and gone on is the same, other labels need no forward, other work is refused."""

import json

import pytest
from safetensors.torch import load_file

from keepsight.diagnosis import diagnose
from keepsight.images import ImageError
from keepsight.vlm import Vlm
from tests.diagnosis.world import picture, plant_sinks, tiny_llava, write_world

METRICS = ("probes", "structure", "spectrum", "fidelity")


@pytest.fixture(scope="module")
def parts():
    return tiny_llava()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), per_class=5)


def run(parts, world, folder, metrics=METRICS, **more):
    settings = {"layers": [0, 2], "batch_size": 4, "metrics": metrics, "progress": False, "keep_features": folder}
    return diagnose(*parts, world[0], masks=world[1], **(settings | more))


@pytest.fixture
def forwards(monkeypatch):
    """Counts forwards; fails from the one whose number is in `last` on."""
    seen = {"count": 0, "last": 10**6}
    given = Vlm.forward_core

    def forward(self, **inputs):
        seen["count"] += 1
        if seen["count"] > seen["last"]:
            raise KeyboardInterrupt
        return given(self, **inputs)

    monkeypatch.setattr(Vlm, "forward_core", forward)
    return seen


def test_stopped_and_gone_on_is_the_same(world, tmp_path, forwards):
    parts = tiny_llava()
    plant_sinks(*parts, world[0])  # in pictures of some batches
    forwards.update(count=0)
    whole = run(parts, world, None)
    assert forwards["count"] == 2 + 4  # eight pictures calibrate, fifteen in four batches follow
    forwards.update(count=0, last=4)
    with pytest.raises(KeyboardInterrupt):
        run(parts, world, tmp_path / "kept")
    forwards.update(count=0, last=2)
    again = run(parts, world, tmp_path / "kept")
    assert forwards["count"] == 2
    assert again.rows == whole.rows
    assert (again.per_image.values == whole.per_image.values)[~(whole.per_image.values != whole.per_image.values)].all()
    assert again.info["counts"] == whole.info["counts"]
    kept = [load_file(file) for file in sorted((tmp_path / "kept" / "model").glob("batch-*"))]
    assert {"bare" in tensors for tensors in kept} == {True, False}


def test_other_labels_need_no_forward(parts, world, tmp_path, forwards):
    first = run(parts, world, tmp_path / "kept")
    names = list(first.per_image.images)
    labels = {"odd": [str(int(name[-5]) % 2) for name in names]}
    expected = run(parts, world, None, labels=labels)
    forwards.update(last=0, count=0)
    found = run(parts, world, tmp_path / "kept", labels=labels)
    assert found.rows == expected.rows
    assert {row.target for row in found.rows} >= {"odd"}
    assert "class" not in {row.target for row in found.rows}
    run(parts, world, tmp_path / "kept", metrics=["probes"])  # less than what is kept


def test_a_stop_at_a_broken_picture_goes_on_without_it(parts, tmp_path, forwards):
    """As the error advises: the batches before it are not run again, and the numbers are those of doing so at once."""
    world = write_world(tmp_path / "world", per_class=5)
    broken = sorted(world[0].rglob("*.png"))[-1]
    broken.write_bytes(broken.read_bytes()[:100])
    settings = {"seed": 0}  # of which the calibration's pictures are whole
    whole = run(parts, world, None, skip_broken=True, **settings)
    forwards["count"] = 0
    with pytest.raises(ImageError, match=r"pass skip_broken=True \(--skip-broken\) to leave such pictures out"):
        run(parts, world, tmp_path / "kept", **settings)
    assert forwards["count"] == 2 + 3
    forwards["count"] = 0
    found = run(parts, world, tmp_path / "kept", skip_broken=True, **settings)
    assert forwards["count"] == 1
    assert found.rows == whole.rows
    assert found.info["counts"]["skipped images"] == 1
    with pytest.raises(ValueError, match="skip_broken: True → False"):
        run(parts, world, tmp_path / "kept", **settings)


def test_masks_given_as_lists_are_told_apart(parts, tmp_path):
    pictures = [picture("red", seed) for seed in range(3)]
    images, masks = [image for image, _ in pictures], [mask.tolist() for _, mask in pictures]
    settings = {"layers": [0], "metrics": ["structure"], "progress": False, "keep_features": tmp_path / "kept"}
    first = diagnose(*parts, images, masks=masks, **settings)
    assert diagnose(*parts, images, masks=masks, **settings).rows == first.rows
    with pytest.raises(ValueError, match="pictures were other ones"):
        diagnose(*parts, images, masks=[[[0] * 32] * 32, *masks[1:]], **settings)


def test_what_does_not_fit_is_named(parts, world, tmp_path):
    kept = tmp_path / "kept"
    run(parts, world, kept, metrics=["probes"])
    for more, text in (
        ({"layers": [0]}, r"layers: \[0, 2\] → \[0\]"),
        ({"batch_size": 5}, "batch_size: 4 → 5"),
        ({"prompt": "What?"}, "prompt: "),
        ({"metrics": ["fidelity"]}, "fidelity: False → True"),
        ({"limit": 12}, "pictures were other ones"),
    ):
        with pytest.raises(ValueError, match=rf"'.*kept/model' keeps the features of another diagnosis \({text}"):
            run(parts, world, kept, **({"metrics": ["probes"]} | more))
    other = tiny_llava(seed=1)
    with pytest.raises(ValueError, match=r"keeps the features of another diagnosis \(model: "):
        run(other, world, kept, metrics=["probes"])
    batch = kept / "model" / "batch-0000002.safetensors"
    batch.write_bytes(batch.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"batch-0000002.safetensors' is damaged .*; delete it, and its pictures are"):
        run(parts, world, kept, metrics=["probes"])
    manifest = kept / "model" / "manifest.json"
    said = json.loads(manifest.read_text())
    assert (said["layers"], said.pop("format")) == ([0, 2], 2)
    manifest.write_text(json.dumps(said))  # as before there was a format
    text = r"format of another version of keepsight \(1; this one's is 2\); choose another folder, or delete it"
    with pytest.raises(ValueError, match=rf"kept/model' keeps features in the {text}"):
        run(parts, world, kept, metrics=["probes"])
    manifest.unlink()
    with pytest.raises(ValueError, match="is not empty and keeps no features of a diagnosis; choose another folder"):
        run(parts, world, kept, metrics=["probes"])
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is a file, not a folder"):
        run(parts, world, tmp_path / "file", metrics=["probes"])
