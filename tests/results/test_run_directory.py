"""Run folders: what they hold, what they refuse, what survives."""

import dataclasses
import errno
import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from keepsight.results import (
    Example,
    LoadedRun,
    Measurement,
    RunDirectory,
    StorageError,
    fingerprint,
    prompt_hash,
)

ROW = Measurement("gap", 0.25, layer=4, n=3, seed=5)


def test_a_run_comes_back_whole(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Config:
        layer: str = "middle"
        folder: Path = Path("a/b")
        sizes: tuple[int, ...] = (1, 2)

    picture = Image.new("RGB", (6, 4), (250, 10, 20))
    mask = np.zeros((4, 6), dtype=np.uint8)
    mask[1:3, 2:5] = 7
    run = RunDirectory.create(
        tmp_path / "deep" / "run",
        label="PRe",
        command="keepsight demo",
        model="tiny",
        fingerprint="00ff",
        depth=8,
        width=192,
        pre_layer=4,
        prompt="Describe the picture.",
        seed=5,
        counts={"skipped images": 2},
        targets={"texture": "never asked"},
        steps=30,
    )
    run.write_rows([ROW])
    run.write_config(Config())
    run.write_examples([Example(picture, mask, "a.png", "a red <b>circle</b>"), Example(picture)])

    loaded = RunDirectory.open(tmp_path / "deep" / "run").load()
    assert loaded.label == "PRe"
    assert loaded.rows == [ROW]
    assert yaml.safe_load(loaded.config) == {"layer": "middle", "folder": "a/b", "sizes": [1, 2]}
    assert loaded.seeds == [5]
    info = loaded.info
    assert info["command"] == "keepsight demo"
    assert info["model"] == {"name": "tiny", "fingerprint": "00ff"}
    assert (info["depth"], info["width"], info["pre_layer"], info["seed"], info["steps"]) == (8, 192, 4, 5, 30)
    assert info["prompt_sha256"] == prompt_hash("Describe the picture.")
    assert info["counts"] == {"skipped images": 2}
    assert info["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert info["versions"]["python"].startswith("3.")
    assert info["created"].endswith("+00:00")
    first, second = loaded.examples
    assert first.name == "a.png"
    assert first.caption == "a red <b>circle</b>"
    np.testing.assert_array_equal(first.mask, mask)
    assert first.image.getpixel((0, 0)) == (250, 10, 20)
    assert second.mask is None


def test_prompt_hash_is_sha256() -> None:
    assert prompt_hash("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_run_stopped_before_its_configuration_differs_in_nothing(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, label="first")
    (tmp_path / ".config.yaml.0123abcd.part").write_text("a:")  # killed while it was written
    assert run.differences({"a": 1}) == {}
    run.write_config({"a": 1})
    assert run.differences({"a": 2}) == {"a": (1, 2)}
    (tmp_path / "config.yaml").unlink()
    run.write_rows([ROW])
    with pytest.raises(ValueError, match=r"has no config\.yaml, so nothing tells .* \(rows\.jsonl\)"):
        run.differences({"a": 1})


def test_a_run_killed_in_its_first_write_can_be_started_again(tmp_path: Path) -> None:
    (tmp_path / ".run.json.0123abcd.part").write_text("{")
    assert RunDirectory.create(tmp_path, label="again").label == "again"


def test_a_folder_with_a_run_is_refused_and_stays(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "run", label="first").write_rows([ROW])
    with pytest.raises(FileExistsError, match=r"'.*run' already holds a run .*pass overwrite=True \(--overwrite\)"):
        RunDirectory.create(tmp_path / "run", label="second")
    assert RunDirectory.open(tmp_path / "run").load().rows == [ROW]


def test_overwrite_replaces_the_run_and_nothing_else(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", label="first")
    run.write_rows([ROW])
    run.write_config({"a": 1})
    run.write_examples([Example(Image.new("RGB", (2, 2)))])
    (run.path / "notes.txt").write_text("mine")
    again = RunDirectory.create(tmp_path / "run", label="second", overwrite=True)
    assert again.load().rows == []
    assert sorted(entry.name for entry in run.path.iterdir()) == ["notes.txt", "run.json"]
    assert RunDirectory.open(run.path).label == "second"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_folder_is_never_touched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"is not empty and holds no keepsight run \(thesis.txt\)"):
        RunDirectory.create(tmp_path, label="x", overwrite=overwrite)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


class Full:
    """A disk on which the write with this number, counted from 0, finds no room."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
        self.left = fails_at
        for owner, name in ((os, "fsync"), (os, "rename"), (Image.Image, "save"), (Path, "mkdir")):
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, real):
        def write(*args, **keywords):
            self.left -= 1
            if self.left == -1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **keywords)

        return write


def save(path: Path, label: str) -> None:
    with RunDirectory.staged(path, label=label, kind="diagnosis", overwrite=True) as run:
        run.write_rows([Measurement("gap", float(len(label)), layer=4, n=3, seed=5)])
        run.write_config({"label": label})
        run.write_examples([Example(Image.new("RGB", (2, 2)), caption=label)])


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_a_full_disk_at_any_write_of_an_overwrite_keeps_the_old_run(tmp_path: Path) -> None:
    save(tmp_path / "run", "first")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before, failed = content(tmp_path / "run"), 0
    for number in range(100):
        with pytest.MonkeyPatch.context() as monkeypatch:
            disk = Full(monkeypatch, number)
            with suppress(StorageError):
                save(tmp_path / "run", "second")
        if disk.left >= 0:
            break
        failed += 1
        assert content(tmp_path / "run") == before
    assert failed >= 12
    run = RunDirectory.open(tmp_path / "run").load()
    assert (run.label, run.rows[0].value, run.examples[0].caption) == ("second", 6.0, "second")
    names = ["config.yaml", "examples", "notes.txt", "rows.jsonl", "run.json"]
    assert sorted(entry.name for entry in (tmp_path / "run").iterdir()) == names


def test_a_full_disk_at_any_write_of_a_first_save_leaves_nothing(tmp_path: Path) -> None:
    for number in range(8):
        with pytest.MonkeyPatch.context() as monkeypatch:
            Full(monkeypatch, number)
            with pytest.raises(StorageError, match="the disk is full"):
                save(tmp_path / "deep" / "run", "first")
        assert list(tmp_path.iterdir()) == []
    save(tmp_path / "deep" / "run", "first")


def test_an_error_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), RunDirectory.staged(tmp_path / "run", label="x"):
        raise KeyError("a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sign", ["kind", "stages", "curves.jsonl", "model"])
def test_a_run_of_another_kind_is_never_replaced(tmp_path: Path, sign: str) -> None:
    run = RunDirectory.create(tmp_path / "run", label="first", **({"kind": "training"} if sign == "kind" else {}))
    run.write_config({"a": 1})
    if sign != "kind":
        (run.path / sign).mkdir()
    before = content(run.path)
    for replace in (save, lambda path, label: RunDirectory.check(path, kind="diagnosis", overwrite=True)):
        with pytest.raises(FileExistsError, match=r"holds a training run, which a diagnosis must not .*another folder"):
            replace(run.path, "second")
    assert content(run.path) == before


def test_a_foreign_run_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"name": "mine"}')
    with pytest.raises(FileExistsError, match=r"cannot be overwritten: .* has no 'label'"):
        save(tmp_path, "x")
    assert (tmp_path / "run.json").read_text() == '{"name": "mine"}'


def test_a_check_leaves_nothing(tmp_path: Path) -> None:
    RunDirectory.check(tmp_path / "deep" / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        for start in (RunDirectory.check, lambda path: RunDirectory.create(path, label="x")):
            with pytest.raises(StorageError, match="a part of the path is a file"):
                start(path)


def test_open_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no run: 'run.json' is missing"):
        RunDirectory.open(tmp_path)
    (tmp_path / "run.json").write_text('{"label": "x"')
    with pytest.raises(ValueError, match=r"run.json' is not JSON"):
        RunDirectory.open(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(ValueError, match="has no 'label'"):
        RunDirectory.open(tmp_path)


def test_update_keeps_the_rest_and_renews_the_hash(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", label="x", depth=8)
    run.update(prompt="abc", counts={"images": 3})
    info = json.loads((run.path / "run.json").read_text())
    assert info["depth"] == 8
    assert info["prompt_sha256"].startswith("ba7816bf")
    assert info["counts"] == {"images": 3}


def test_examples_never_lead_out_of_their_folder(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", label="x")
    run.write_examples([Example(Image.new("RGB", (2, 2)))])
    Image.new("RGB", (2, 2)).save(tmp_path / "secret.png")
    index = run.path / "examples" / "examples.json"
    index.write_text('[{"image": "../../secret.png", "mask": null, "name": "", "caption": ""}]')
    with pytest.raises(ValueError, match=r"names '../../secret.png', which is not a picture in that folder"):
        run.load()


def test_values_that_json_cannot_hold_are_refused(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", label="x")
    with pytest.raises(TypeError, match="plain values"):
        run.update(model=torch.nn.Linear(1, 1))
    assert RunDirectory.open(run.path).label == "x"


def test_seeds_come_from_the_list_the_rows_or_the_seed() -> None:
    rows = [Measurement("gap", 0.1, seed=4), Measurement("gap", 0.1, seed=2), Measurement("gap", 0.1)]
    assert LoadedRun("x", rows, {"seeds": [9, 8]}).seeds == [8, 9]
    assert LoadedRun("x", rows, {"seed": 7}).seeds == [2, 4]
    assert LoadedRun("x", rows[2:], {"seed": 7}).seeds == [7]
    assert LoadedRun("x", []).seeds == []


def test_fingerprint_tells_weights_apart() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 20), torch.nn.LayerNorm(20)).to(torch.bfloat16)
    before = fingerprint(model)
    assert len(before) == 16
    assert fingerprint(model) == before
    assert fingerprint(model.float()) != before  # the type counts
    before = fingerprint(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-3
    assert fingerprint(model) != before
