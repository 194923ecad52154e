"""Skill against what the layers tell: r by hand, several seeds, and the command over a real training."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy import stats

from keepsight import cli
from keepsight.report import verdict
from keepsight.results import Measurement, Point, RunDirectory
from keepsight.results.trend import correlations, over_seeds
from keepsight.training.checkpoints import kept_weights
from keepsight.training.config import TrainConfig
from keepsight.training.history import moments, replay
from keepsight.vlm.load import load_model
from tests.tiny_processors import save_llava


def point(name: str, skill: float, probe: float, fidelity: float = 0.5) -> Point:
    return Point(
        name,
        [
            Measurement("answer_accuracy", skill),
            Measurement("answer_accuracy", 0.0, target="colour"),
            Measurement("probe_accuracy", probe, layer=2, target="texture"),
            Measurement("probe_accuracy", 0.1, layer=2, target="texture", variant="shuffled labels"),
            Measurement("probe_accuracy", 0.2, layer=2, target="texture", tokens="without sinks"),
            Measurement("fidelity", fidelity, layer=2),
        ],
    )


SKILL, PROBE = [0.2, 0.4, 0.5, 0.9], [0.9, 0.7, 0.8, 0.4]


def test_r_is_pearsons():
    found = {
        row.target: row
        for row in correlations([point(str(i), s, p) for i, (s, p) in enumerate(zip(SKILL, PROBE, strict=True))])
    }
    assert found["texture"].value == pytest.approx(stats.pearsonr(SKILL, PROBE).statistic)
    assert (found["texture"].layer, found["texture"].n, found["texture"].unit) == (2, 4, "checkpoints")
    assert (found["texture"].low, found["texture"].note) == (None, "one training: an r without an interval")
    assert (found["fidelity"].value, found["fidelity"].note) == (
        None,
        "one of the two does not change over the training",
    )
    assert set(found) == {"texture", "fidelity"}
    (row, _) = correlations([point("a", 0.1, 0.2), point("b", 0.3, 0.1)])
    assert (row.value, row.note) == (None, "2 points; at least 3 are needed")


def test_seeds_give_an_interval_of_fishers_z():
    values = [-0.9, -0.7, -0.5]
    rows = [[Measurement("attribution", value, layer=2, target="texture")] for value in values]
    (found,) = over_seeds(rows)
    z = np.arctanh(values)
    low, high = stats.t.interval(0.95, 2, loc=z.mean(), scale=stats.sem(z))
    assert (found.value, found.low, found.high) == pytest.approx((np.tanh(z.mean()), np.tanh(low), np.tanh(high)))
    assert (found.n, found.unit) == (3, "seeds")
    assert over_seeds(rows[:1]) == rows[0]
    (lacking,) = over_seeds([*rows, [Measurement("attribution", None, layer=2, target="texture", note="flat")]])
    assert lacking.value is None
    assert lacking.note == "1 of 4 trainings have no r (flat)"
    (other,) = over_seeds([[], *rows[1:]])
    assert (other.value, other.note) == (None, "1 of 3 trainings have no r (not measured)")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A model, pictures in two classes, conversations and questions about them."""
    root = tmp_path_factory.mktemp("world")
    save_llava(root / "model")
    generator = np.random.default_rng(0)
    conversations, questions = [], []
    for number in range(14):
        name = ("dark", "light")[number % 2]
        path = root / "pictures" / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 100, (16, 16, 3)) + 120 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        turns = [
            {"from": "human", "value": "<image>\nwhat color ?"},
            {"from": "gpt", "value": ("red", "blue")[number % 2]},
        ]
        conversations.append({"id": str(number), "image": f"{name}/{number}.png", "conversations": turns})
        questions.append(
            {
                "question": "what color ?",
                "answer": ("red", "blue")[number % 2],
                "image": f"pictures/{name}/{number}.png",
            }
        )
    (root / "train.json").write_text(json.dumps(conversations))
    (root / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    return root


def train(world: Path, out: Path, **changes) -> Path:
    recipe = {
        "model": {"path": str(world / "model")},
        "out": str(out),
        "data": {"conversations": str(world / "train.json"), "image_folder": str(world / "pictures")},
        "projector": {"batch_size": 4, "max_steps": 2, "lr": 1e-2},
        "full": {"batch_size": 4, "max_steps": 4, "lr": 1e-2},
        "save_steps": 2,
        "trainer": {"use_cpu": True, "logging_steps": 1, "report_to": []},
        **changes,
    }
    (out.parent / f"{out.name}.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.main(["train", str(out.parent / f"{out.name}.yaml")]) == 0
    return out


@pytest.mark.slow
def test_over_a_training_stopped_and_gone_on(world, tmp_path, capsys, monkeypatch):
    run = train(world, tmp_path / "run", keep_weights=True)
    opened = RunDirectory.open(run)
    assert [moment.name for moment in moments(opened)] == ["start", "projector-2", "full-2", "full-4"]
    replayed = {}
    for moment, model, _ in replay(opened, lambda moment: True):
        replayed[moment.name] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    final = load_model(run)[0].state_dict()
    start = load_model(world / "model")[0].state_dict()
    assert all((replayed["full-4"][name] == tensor).all() for name, tensor in final.items())
    assert all((replayed["start"][name] == tensor).all() for name, tensor in start.items())
    assert any((replayed["full-2"][name] != tensor).any() for name, tensor in final.items())

    command = ["attribute", str(run), "--images", str(world / "pictures"), "--tasks", str(world / "questions.jsonl")]
    command += ["--out", str(tmp_path / "out"), "--max-new-tokens", "2"]
    from keepsight import attribution

    whole, seen = attribution.evaluate, []

    def stop(*arguments, **named):
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return whole(*arguments, **named)

    monkeypatch.setattr(attribution, "evaluate", stop)
    assert cli.main(command) == 130
    assert sorted(folder.name for folder in (tmp_path / "out" / "run").iterdir()) == ["projector-2", "start"]
    assert cli.main(command) == 0
    assert len(seen) == 5  # two points were not done again
    said = capsys.readouterr().out
    assert "run: start (done before)" in said
    assert "r with skill, class" in said
    made = RunDirectory.open(tmp_path / "out")
    assert (made.kind, made.label, made.info["depth"], made.info["seeds"]) == ("attribution", "out", 4, [0])
    assert made.info["counts"] == {
        "trainings": 1,
        "checkpoints": 4,
        "questions": 14,
        "images": 14,
        "skipped images": 0,
    }
    loaded = made.load()
    assert {row.target for row in loaded.rows} == {"class", "fidelity"}
    assert {row.n for row in loaded.rows if row.value is not None} <= {4}
    assert [(point.training, point.name) for point in loaded.points] == [("run", name) for name in replayed]
    assert all(point.skill.n == 14 for point in loaded.points)
    assert "max_new_tokens: 2" in loaded.config
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert '<section id="attribution">' in page
    assert verdict([made]) in " ".join(said.split())
    assert cli.main([*command, "--limit", "3"]) == 2
    assert "was made with other settings (limit: None, now 3); choose another --out" in capsys.readouterr().err
    shutil.copytree(run, tmp_path / "copy")
    assert cli.main([*command[:2], str(tmp_path / "copy"), *command[2:]]) == 2
    assert "the runs run, copy ended in the same weights, so they are no replicates" in capsys.readouterr().err
    anew = json.loads((run / "run.json").read_text()) | {"created": "2001-01-01T00:00:00+00:00"}
    (tmp_path / "anew").mkdir()
    shutil.copytree(run, tmp_path / "anew" / "run")
    (tmp_path / "anew" / "run" / "run.json").write_text(json.dumps(anew))
    assert cli.main([*command[:1], str(tmp_path / "anew" / "run"), *command[2:]]) == 2
    assert "now 'training started 2001-01-01T00:00:00+00:00'); choose another --out" in capsys.readouterr().err
    again = train(world, tmp_path / "again", keep_weights=True, seed=1)
    assert cli.main([*command[:2], str(again), *command[2:]]) == 0  # joins: only its points are measured
    assert len(seen) == 9
    loaded = RunDirectory.open(tmp_path / "out").load()
    assert list(dict.fromkeys(point.training for point in loaded.points)) == ["run", "again"]
    assert {row.unit for row in loaded.rows} == {"seeds"}
    assert loaded.seeds == [0, 1]
    assert "sources:\n- " in loaded.config
    assert cli.main(["compare", str(tmp_path / "out"), "--out", str(tmp_path / "compared.html")]) == 0
    assert '<section id="attribution">' in (tmp_path / "compared.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_models_of_one_name_are_not_taken_for_one_another(world, tmp_path, capsys):
    models = [shutil.copytree(world / "model", tmp_path / part / "final") for part in "abcd"]
    command = ["--images", str(world / "pictures"), "--tasks", str(world / "questions.jsonl"), "--limit", "2"]
    command += ["--out", str(tmp_path / "o"), "--max-new-tokens", "1"]
    assert cli.main(["attribute", *map(str, models[:3]), *command]) == 0
    assert cli.main(["attribute", *map(str, models[:3]), *command]) == 0
    assert capsys.readouterr().out.count("-final (done before)") == 3
    assert cli.main(["attribute", *map(str, [models[0], models[3], models[2]]), *command]) == 2
    said = capsys.readouterr().err
    assert f"'{tmp_path / 'o' / 'models' / '01-final'}' was made with other settings (weights: '{models[1]}" in said
    assert f"now '{models[3]}" in said
    written = next(models[2].glob("*.safetensors"))
    os.utime(written, (written.stat().st_atime, written.stat().st_mtime + 5))
    assert cli.main(["attribute", *map(str, models[:3]), *command]) == 2
    assert "02-final' was made with other settings (weights: " in capsys.readouterr().err


def test_only_the_newest_checkpoint_stays_unless_asked(world, tmp_path, capsys):
    run = train(world, tmp_path / "run", full={"enabled": False})
    assert kept_weights(run / "stages" / "projector") == []
    assert (
        cli.main(
            [
                "attribute",
                str(run),
                "--images",
                "x",
                "--tasks",
                str(world / "questions.jsonl"),
                "--out",
                str(tmp_path / "o"),
            ]
        )
        == 2
    )
    assert "kept no weights on the way: train with keep_weights: true" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_bad_input_is_named(world, tmp_path, capsys):
    common = ["--images", str(world / "pictures"), "--tasks", str(world / "questions.jsonl")]
    common += ["--out", str(tmp_path / "o")]
    assert cli.main(["attribute", str(world / "model"), *common]) == 2
    assert "is no training run; give one, or two models or more" in capsys.readouterr().err
    assert cli.main(["attribute", *common]) == 2
    assert "sources is not given; give it as the first arguments" in capsys.readouterr().err
    (tmp_path / "labels.json").write_text(json.dumps({"fidelity": {"dark/0.png": "x"}}))
    assert cli.main(["attribute", "x", *common, "--labels", str(tmp_path / "labels.json")]) == 2
    assert (
        "has a label set 'fidelity', which is what a layer's fidelity is called; rename it" in capsys.readouterr().err
    )
    other = RunDirectory.create(tmp_path / "o", label="x", kind="diagnosis")
    assert cli.main(["attribute", str(world / "model"), str(world / "model"), *common]) == 2
    assert f"'{other.path}' holds a diagnosis run, which an attribution must not replace" in capsys.readouterr().err
    with pytest.raises(ValueError, match="keep_weights is on and save_steps is null"):
        TrainConfig(model={"path": "x"}, out="o", data=_data(), keep_weights=True, save_steps=None)


def _data():
    from keepsight.training.config import DataConfig

    return DataConfig(conversations="x")
