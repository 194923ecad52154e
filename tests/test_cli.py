"""The commands end to end, in this process: exit status, messages, files."""

import errno
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from keepsight import cli
from keepsight.commands import demo, diagnose
from keepsight.results import RunDirectory
from tests.tiny_processors import save_llava
from tests.training.test_conversations import entry, write


def fails(arguments: list[str], capsys) -> str:
    """The one message of a command that the user can mend."""
    capsys.readouterr()
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Twelve pictures in two classes, with masks of two objects in tmp_path/masks."""
    generator = np.random.default_rng(0)
    for number in range(12):
        name = ("dark", "light")[number % 2]
        for folder in (tmp_path / "pictures" / name, tmp_path / "masks" / name):
            folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 100, (16, 16, 3)) + 120 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "pictures" / name / f"{number}.png")
        mask = np.zeros((16, 16), dtype=np.uint8)
        mask[:8], mask[8:, :8] = 1, 2
        Image.fromarray(mask).save(tmp_path / "masks" / name / f"{number}.png")
    return tmp_path / "pictures"


def test_help_lists_the_commands_and_unknown_ones_are_refused(capsys) -> None:
    with pytest.raises(SystemExit) as status:
        cli.main([])
    assert status.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"  {command} " in shown for command in cli.COMMANDS)
    with pytest.raises(SystemExit) as status:
        cli.main(["diagnos"])
    assert status.value.code == 2
    assert f"there is no command 'diagnos'; allowed: {', '.join(cli.COMMANDS)}" in capsys.readouterr().err


@pytest.mark.slow
def test_train_then_diagnose(tmp_path: Path, labelled: Path, capsys) -> None:
    trained = tmp_path / "a [" / "run]"  # what rich would take for markup
    pairs = (("red", "dark/0.png"), ("blue", "light/1.png"))
    rows = [entry("<image>\nwhat color ?", color, image=image) for color, image in pairs]
    write(tmp_path, *rows)
    save_llava(tmp_path / "start")
    recipe = {
        "model": {"path": str(tmp_path / "start")},
        "data": {"conversations": str(tmp_path / "data.json"), "image_folder": str(labelled)},
        "out": str(trained),
        "projector": {"enabled": False},
        "full": {"batch_size": 2, "max_steps": 2},
        "trainer": {"use_cpu": True, "logging_steps": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert cli.main(["train", str(tmp_path / "recipe.yaml"), "--pre.layer", "3"]) == 0
    shown = capsys.readouterr().out
    assert "stage full: loss " in shown
    assert "PRe cosine" in shown
    assert f"model and processor: {trained / 'model'}" in shown.replace("\n", "")
    assert "already holds a run" in fails(["train", str(tmp_path / "recipe.yaml")], capsys)

    into_training = ["diagnose", str(trained), f"--images={labelled}", f"--out={trained}"]
    for more in ([], ["--overwrite"]):
        assert "holds a training run, which a diagnosis must not" in fails([*into_training, *more], capsys)
    assert (trained / "curves.jsonl").is_file()

    command = ["diagnose", str(trained), f"--images={labelled}", f"--masks={tmp_path / 'masks'}"]
    command += [f"--out={tmp_path / 'seen'}", "--batch-size", "5", "--seed=3"]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "report: " in shown
    run = RunDirectory.open(tmp_path / "seen")
    assert (run.label, run.info["pre_layer"], run.info["depth"], run.info["seed"]) == ("run]", 3, 4, 3)
    found = {(row.metric, row.layer) for row in run.read_rows()}
    assert {("gap", layer) for layer in range(5)} <= found
    assert {("probe_accuracy", layer) for layer in range(5)} <= found
    assert (run.path / "report.html").stat().st_size > 1000
    assert "already holds a run" in fails(command, capsys)
    changed = ["--layers", "[0,4]", "--metrics", "structure,fidelity", "--nulls", "random_weights", "--overwrite"]
    changed += ["--initial", str(trained)]
    assert cli.main(["diagnose", "--config", str(run.path / "config.yaml"), *changed]) == 0
    capsys.readouterr()
    again = RunDirectory.open(tmp_path / "seen")
    assert {row.layer for row in again.read_rows() if row.metric == "gap"} == {0, 4}
    kinds = {row.variant for row in again.read_rows() if row.metric == "fidelity"}
    assert {"", "position only", "random weights"} <= kinds
    assert "metrics holds 'lense'; allowed: default, all, or any of probes, structure" in fails(
        [*command, "--overwrite", "--metrics=lense"], capsys
    )
    assert "nulls holds 'noise'; allowed: random_weights" in fails([*command, "--overwrite", "--nulls=noise"], capsys)
    assert yaml.safe_load((again.path / "config.yaml").read_text())["layers"] == [0, 4]


def test_diagnose_takes_all_tokens_when_asked(tmp_path: Path, labelled: Path, capsys) -> None:
    save_llava(tmp_path / "tiny")
    command = ["diagnose", str(tmp_path / "tiny"), f"--images={labelled}", "--layers=[0]", "--metrics=spectrum"]
    for more, said in (([], "seeded sample of tokens"), (["--exact", "--device-map=cpu"], "all tokens")):
        out = tmp_path / said
        assert cli.main([*command, f"--out={out}", *more]) == 0
        notes = {row.note for row in RunDirectory.open(out).read_rows() if row.metric == "participation_ratio"}
        assert notes == {said}


@pytest.mark.parametrize("beside", ['{"pre_layer": "x"}', "[1]", "{", '{"label": "other", "pre_layer": 2}'])
def test_a_file_beside_a_model_is_not_taken_for_its_training(
    tmp_path: Path, labelled: Path, beside: str, monkeypatch, capsys
) -> None:
    model = save_llava(tmp_path / "tiny")
    (tmp_path / "run.json").write_text(beside)
    monkeypatch.chdir(model)
    command = ["diagnose", ".", f"--images={labelled}", f"--out={tmp_path / 'out'}", "--layers=[0]"]
    assert cli.main(command) == 0
    run = RunDirectory.open(tmp_path / "out")
    assert (run.label, run.info["pre_layer"], run.kind) == ("tiny", None, "diagnosis")


def test_brackets_in_paths_and_labels_are_printed_as_they_are(tmp_path: Path, labelled: Path, capsys) -> None:
    out = tmp_path / "o [" / "red] x"  # o [/red] x
    command = ["diagnose", str(save_llava(tmp_path / "tiny")), f"--images={labelled}", f"--out={out}", "--layers=[0]"]
    assert cli.main([*command, "--label=[red]"]) == 0
    shown = capsys.readouterr().out.replace("\n", "")
    assert str(out / "report.html") in shown
    assert "of [red]" in shown


def test_an_output_folder_that_cannot_be_written_is_refused_first(tmp_path: Path, labelled: Path, capsys) -> None:
    (tmp_path / "file").write_text("x")
    out = f"--out={tmp_path / 'file' / 'run'}"
    assert "a part of the path is a file" in fails(["diagnose", "./none", f"--images={labelled}", out], capsys)


def test_saved_data_sets(tmp_path: Path, labelled: Path, capsys) -> None:
    datasets = pytest.importorskip("datasets")
    pictures = sorted(str(path) for path in labelled.rglob("*.png"))
    rows = {"image": pictures, "label": [Path(path).parent.name for path in pictures]}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict({"test": dataset}).save_to_disk(tmp_path / "one")
    model = str(save_llava(tmp_path / "model"))
    command = ["diagnose", model, f"--out={tmp_path / 'out'}", "--layers=[0]"]
    assert cli.main([*command, f"--images={tmp_path / 'one'}"]) == 0
    rows = RunDirectory.open(tmp_path / "out").read_rows()
    assert any(row.metric == "probe_accuracy" and row.value is not None for row in rows)

    datasets.DatasetDict({"test": dataset, "train": dataset}).save_to_disk(tmp_path / "two")
    error = fails([*command, f"--images={tmp_path / 'two'}", "--overwrite"], capsys)
    assert f"holds the splits ['test', 'train']; give the folder of one of them, such as --images {tmp_path}" in error

    cut = next((tmp_path / "one" / "test").glob("*.arrow"))
    cut.write_bytes(cut.read_bytes()[:100])
    error = fails([*command, f"--images={tmp_path / 'one'}", "--overwrite"], capsys)
    assert f"the data set '{tmp_path / 'one' / 'test'}' cannot be loaded (" in error


def test_layers_by_name() -> None:
    command = ["m", "--images=i", "--out=o"]
    assert diagnose.parse([*command, "--layers=[0,middle,last]"]).layers == [0, "middle", "last"]
    assert diagnose.parse([*command, "--layers=[0,8]"]).layers == [0, 8]


def test_labels_from_a_file(tmp_path: Path, labelled: Path) -> None:
    names = [f"{name}/{number}.png" for number, name in zip(range(4), ("dark", "light") * 2, strict=True)]
    sets = {"size": {names[0]: "big", names[1]: "small"}, "hue": {names[2]: "warm"}}
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(sets), encoding="utf-8")
    found = diagnose.read_labels(str(path), str(labelled), None)
    assert {target: sum(label is not None for label in labels) for target, labels in found.items()} == {
        "size": 2,
        "hue": 1,
    }
    assert len(found["size"]) == 12
    path.write_text(json.dumps({"size": {"nowhere.png": "big"}}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"labels 1 pictures in 'size' that are not there, such as 'nowhere.png'"):
        diagnose.read_labels(str(path), str(labelled), None)
    path.write_text(json.dumps({"size": "big"}), encoding="utf-8")
    with pytest.raises(ValueError, match=r'must hold {"label set": {"picture": "label", …}, …}'):
        diagnose.read_labels(str(path), str(labelled), None)
    path.write_text(json.dumps({"size": {names[0]: ["big", "tall"]}}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"'dark/0.png' the label \['big', 'tall'\] in 'size'; a picture has one"):
        diagnose.read_labels(str(path), str(labelled), None)
    path.write_text(json.dumps(sets), encoding="utf-8-sig")
    assert set(diagnose.read_labels(str(path), str(labelled), None)) == {"size", "hue"}
    path.write_text(json.dumps(sets), encoding="utf-16")
    with pytest.raises(ValueError, match=r"labels.json' is not UTF-8 text .* save it as UTF-8"):
        diagnose.read_labels(str(path), str(labelled), None)
    with pytest.raises(FileNotFoundError, match=r"label file 'none.json' does not exist"):
        diagnose.read_labels("none.json", str(labelled), None)


def test_errors_that_the_user_can_mend(tmp_path: Path, labelled: Path, capsys) -> None:
    out = f"--out={tmp_path / 'out'}"
    images = f"--images={labelled}"
    assert "model is not given; give it as the first argument" in fails(["diagnose", images, out], capsys)
    assert "images is not given; give it with --images DIR" in fails(["diagnose", "m", out], capsys)
    assert "out is not given; give it with --out DIR" in fails(["diagnose", "m", images], capsys)
    assert "seed is -1; allowed: 0 or more" in fails(["diagnose", "m", images, out, "--seed=-1"], capsys)
    assert "seed is -1; allowed: 0 or more" in fails(["demo", "--seed=-1"], capsys)
    for device in ("foo", "cuda:99"):
        error = fails(["diagnose", "./none", images, out, f"--device={device}"], capsys)
        assert f"device is '{device}', which cannot be used here (" in error
        assert "; allowed: 'auto', 'cpu', or a device of this machine" in error
    with pytest.raises(SystemExit):
        cli.main(["diagnose", "m", images, out, "--dtype=int7"])
    assert "int7" in capsys.readouterr().err
    assert "layers is 'some'" in fails(["diagnose", "m", images, out, "--layers=some"], capsys)
    assert "the model './none' does not exist" in fails(["diagnose", "./none", images, out], capsys)
    model = str(save_llava(tmp_path / "model"))
    assert "image folder" in fails(["diagnose", model, f"--images={tmp_path / 'none'}", out], capsys)
    assert "layer 9 does not exist" in fails(["diagnose", model, images, out, "--layers=[9]"], capsys)
    assert "layer 'top' does not exist" in fails(["diagnose", model, images, out, "--layers=[0,top]"], capsys)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    assert "weights file (.safetensors) is cut off or damaged" in fails(["diagnose", model, images, out], capsys)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "holds no keepsight run" in fails(["diagnose", "m", images, out, "--overwrite"], capsys)
    assert "out is not set" in fails(["train", "--model.path=m", "--data.dataset=d", "--out="], capsys)


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="model is not given"):
        cli.main(["diagnose", "--debug", "--images=a", "--out=b"])


def test_only_our_own_errors_are_taken_for_the_users(monkeypatch, capsys) -> None:
    def library(arguments) -> None:
        np.zeros(3).reshape(2, 2)

    def bug(arguments) -> None:
        raise KeyError("a")

    def full_disk(arguments) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def interrupted(arguments) -> None:
        raise KeyboardInterrupt

    def missing(arguments) -> None:
        monkeypatch.setattr("keepsight.commands.train.find_spec", lambda name: None)
        from keepsight.commands import train

        train.main(["--model.path=m", "--data.dataset=d", "--out=o"])

    monkeypatch.setattr(demo, "main", library)
    with pytest.raises(ValueError, match="cannot reshape"):
        cli.main(["demo"])
    monkeypatch.setattr(demo, "main", bug)
    with pytest.raises(KeyError):
        cli.main(["demo"])
    monkeypatch.setattr(demo, "main", full_disk)
    assert "No space left on device" in fails(["demo"], capsys)
    monkeypatch.setattr(demo, "main", missing)
    assert 'pip install "keepsight[train]"' in fails(["demo"], capsys)
    monkeypatch.setattr(demo, "main", interrupted)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == ""


def test_demo_settings(capsys) -> None:
    assert demo.parse([]) == demo.DemoConfig()
    given = demo.parse(["--full", "--out", "a", "--seed=2", "--steps", "9", "--language", "qwen2"])
    assert given == demo.DemoConfig(full=True, out="a", seed=2, steps=9, language="qwen2")
    with pytest.raises(ValueError, match="steps is 0; allowed: 1 or more"):
        demo.parse(["--steps=0"])
    with pytest.raises(SystemExit):
        demo.parse(["runs/mine"])
    assert "demo takes options only; got 'runs/mine' (a folder is given with --out DIR)" in capsys.readouterr().err


def test_module_can_be_run() -> None:
    import subprocess

    shown = subprocess.run([sys.executable, "-m", "keepsight", "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("keepsight 0.")
