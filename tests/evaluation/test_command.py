"""`keepsight evaluate` end to end: in this process, stopped and gone on, and on two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keepsight import cli
from keepsight.results import RunDirectory
from tests.tiny_processors import save_llava

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_llava(tmp_path_factory.mktemp("model") / "model"))


@pytest.fixture
def tasks(tmp_path) -> list[str]:
    generator = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    entries = []
    for number in range(6):
        pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number}.png")
        for kind, answer in (("colour", "red"), ("yes", "yes")):
            entries.append(
                {"question": "what color ?", "answer": answer, "image": f"pictures/{number}.png", "type": kind}
            )
    files = []
    for name in ("one", "two"):
        files.append(str(tmp_path / f"{name}.jsonl"))
        Path(files[-1]).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return files


def test_two_tasks(model, tasks, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["evaluate", model, "--tasks", *tasks, "--out", str(out), "--max-new-tokens", "2", "--batch-size", "5"]
    assert cli.main(command) == 0
    run = RunDirectory.open(out)
    assert (run.kind, run.info["finished"], run.info["counts"]["questions"]) == ("evaluation", True, 24)
    accuracies = {row.target: row for row in run.read_rows() if row.metric == "answer_accuracy"}
    assert set(accuracies) == {f"{task}{kind}" for task in ("one", "two") for kind in ("", ", colour", ", yes")}
    assert accuracies["one"].n == 12
    kept = run.load().per_image
    assert set(kept.images) == {f"pictures/{number}.png" for number in range(6)}
    assert all(np.nanmean(kept.of(row.key)) == pytest.approx(row.value, abs=1e-6) for row in accuracies.values())
    assert "questions: 24" in capsys.readouterr().out
    said = run.read_answers()
    assert [record.task for record in said] == ["one"] * 12 + ["two"] * 12
    assert said[3].images == ("pictures/1.png",)
    assert (said[3].id, said[3].type, said[3].reference, said[3].scored_by) == ("3", "yes", ("yes",), "yes_no")
    assert np.mean([record.score for record in said[:12]]) == pytest.approx(accuracies["one"].value)
    small = run.load().thumbnails.get("two", "pictures/1.png")
    assert np.array_equal(small, Image.open(tmp_path / "pictures" / "1.png"))
    assert cli.main(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "already holds a run ('run.json' is there). Choose another folder, or go on with it by resume=True" in said
    assert cli.main([*command, "--resume"]) == 0
    assert cli.main([*command, "--resume", "--choices", "likelihood"]) == 2
    assert "was started with other settings (choices: 'generation', now 'likelihood')" in capsys.readouterr().err


def test_a_pruned_evaluation_says_so(model, tasks, tmp_path):
    out = tmp_path / "run"
    command = ["evaluate", model, "--tasks", tasks[0], "--out", str(out), "--max-new-tokens", "2", "--limit", "2"]
    assert cli.main([*command, "--prune-keep", "0.5", "--prune-layer", "1"]) == 0
    assert RunDirectory.open(out).info["pruning"] == "attention, 50% after layer 1"


def test_limit_and_what_is_left_out(model, tasks, tmp_path, capsys):
    (tmp_path / "pictures" / "0.png").unlink()
    out = tmp_path / "run"
    assert (
        cli.main(["evaluate", model, "--tasks", tasks[0], "--out", str(out), "--limit", "4", "--max-new-tokens", "1"])
        == 0
    )
    assert RunDirectory.open(out).info["counts"]["questions left out"] == 2
    said = RunDirectory.open(out).read_answers()
    assert [record.score is None for record in said] == [True, True, False, False]
    assert "is missing" in said[0].left_out
    assert "left out of one: question 1: image 'pictures/0.png'" in capsys.readouterr().out


def test_a_task_that_cannot_be_asked_does_not_lose_the_other(model, tasks, tmp_path, capsys):
    bad, out = tmp_path / "bad.jsonl", tmp_path / "run"
    bad.write_text('{"question": "what ?", "answer": "red", "image": "gone.png"}\n')
    command = ["evaluate", model, "--max-new-tokens", "1", "--out", str(out), "--tasks"]
    assert cli.main([*command, str(bad), tasks[0]]) == 1
    assert "not reached: bad: none of the 1 questions can be asked; the first: image 'gone" in capsys.readouterr().out
    run = RunDirectory.open(out)
    assert (list(run.info["unreached"]), run.info["finished"]) == (["bad"], False)
    assert {record.task for record in run.read_answers()} == {"one"}
    # Named as they will be when the other is reached.
    assert {row.target for row in run.read_rows()} == {"one", "one, colour", "one, yes"}
    Image.new("RGB", (16, 16)).save(tmp_path / "gone.png")
    assert cli.main([*command, str(bad), tasks[0], "--resume"]) == 0
    assert {record.task for record in run.read_answers()} == {"bad", "one"}


def test_the_drawn_world_by_name(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["evaluate", model, "--tasks", "testbed", "testbed-pope", "--out", "run", "--limit", "12"]
    assert cli.main([*command, "--max-new-tokens", "1"]) == 0
    run = RunDirectory.open("run")
    targets = {row.target for row in run.read_rows() if row.metric == "answer_f1"}
    assert {"testbed-pope", "testbed-pope, random", "testbed-pope, popular", "testbed-pope, adversarial"} <= targets
    assert sum(record.reference == ("yes",) for record in run.read_answers() if record.task == "testbed-pope") == 6


def test_a_saved_data_set(model, tmp_path):
    from datasets import Dataset

    pictures = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    rows = {"question": ["what color ?"] * 2, "answer": ["red", "blue"], "image": pictures}
    Dataset.from_dict(rows).save_to_disk(str(tmp_path / "set"))
    command = ["evaluate", model, "--tasks", str(tmp_path / "set"), "--out", str(tmp_path / "run")]
    assert cli.main([*command, "--max-new-tokens", "1"]) == 0
    assert RunDirectory.open(tmp_path / "run").info["counts"]["questions"] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "none.jsonl", "--out", "x"], "the question file 'none.jsonl' does not exist"),
        (["--out", "x"], "tasks is not given; give it with --tasks FILE"),
        (["--tasks", "a/q.jsonl", "b/q.jsonl", "--out", "x"], "tasks holds two of one name"),
        (["--tasks", "q.jsonl", "--out", "x", "--limit", "0"], "limit is 0; allowed: 1 or more"),
    ],
)
def test_bad_input_is_named(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", "model", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["./typo"], "the model './typo' does not exist"),
        (["--prune-keep", "0.5", "--prune-layer", "99"], "layer 99 does not exist"),
        (["--prune-keep", "5"], "keep is 5.0; allowed: a share"),
    ],
)
def test_a_start_that_fails_does_not_take_the_folder(wrong, said, model, tasks, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["evaluate", *([] if wrong[0] == "./typo" else [model]), *wrong]
    assert cli.main([*command, "--tasks", tasks[0], "--out", str(out)]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
def test_two_processes_answer_like_one(model, tasks, tmp_path):
    command = ["-m", "keepsight", "evaluate", model, "--tasks", tasks[0], "--max-new-tokens", "2", "--batch-size", "2"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, given in (("one", command), ("two", [*launch, *command])):
        done = subprocess.run(
            [sys.executable, *given, "--out", str(tmp_path / name)],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = RunDirectory.open(tmp_path / "one"), RunDirectory.open(tmp_path / "two")
    assert one.read_rows() == two.read_rows()
    shares = [len(file.read_text().splitlines()) for file in sorted((tmp_path / "two" / "answers" / "one").iterdir())]
    assert shares == [6, 6]
