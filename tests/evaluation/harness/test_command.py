"""`keepsight evaluate --tasks` with names of lmms-eval's tasks: what is reached, what is not, and going on."""

import json
from pathlib import Path

import pytest

from keepsight import cli
from keepsight.commands import harness
from keepsight.results import RunDirectory
from tests.evaluation.harness.benchmarks import on_disk
from tests.tiny_processors import save_llava

NINE = ["gqa", "mmmu_val", "ai2d", "mmstar", "textvqa_val", "ocrbench", "realworldqa", "mmvp", "pope"]


def test_names_and_files_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("questions").mkdir()
    own, names = harness.split_tasks(["a.jsonl", "questions", "far/set", "gqa,pope", "pope", "paper"])
    assert own == ["a.jsonl", "questions", "far/set"]
    assert names == ["gqa", "pope", *(name for name in NINE if name not in ("gqa", "pope"))]
    assert harness.split_tasks(["paper"])[1] == NINE


def without_lmms_eval(monkeypatch):
    monkeypatch.setattr("keepsight.evaluation.harness.find_spec", lambda name: None)


def test_without_lmms_eval_it_is_said_before_anything_is_made(tmp_path, monkeypatch, capsys):
    without_lmms_eval(monkeypatch)
    assert cli.main(["evaluate", "model", "--tasks", "gqa,pope", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert 'gqa, pope cannot be run: lmms-eval is not installed: pip install "keepsight[eval]"' in said
    assert not (tmp_path / "run").exists()


def test_without_lmms_eval_own_questions_are_asked(tmp_path, monkeypatch, capsys):
    without_lmms_eval(monkeypatch)
    model, file = str(save_llava(tmp_path / "model")), tmp_path / "own.jsonl"
    file.write_text(json.dumps({"question": "what ?", "answer": "red"}) + "\n")
    command = ["evaluate", model, "--tasks", str(file), "pope", "--out", str(tmp_path / "run"), "--max-new-tokens", "1"]
    assert cli.main(command) == 1
    assert "not reached: pope: lmms-eval is not installed" in capsys.readouterr().out
    run = RunDirectory.open(tmp_path / "run")
    assert run.info["unreached"].keys() == {"pope"}
    assert not run.info["finished"]
    assert [row.target for row in run.read_rows() if row.metric == "answer_accuracy"] == ["own"]


@pytest.fixture
def quickly(monkeypatch):
    """lmms-eval tries five times to load what is not there, two seconds apart."""
    pytest.importorskip("lmms_eval.evaluator", reason="needs lmms-eval: make test-harness", exc_type=ImportError)
    from lmms_eval.api.task import ConfigurableTask
    from tenacity import wait_none

    monkeypatch.setattr(ConfigurableTask.download.retry, "wait", wait_none())


@pytest.mark.slow
def test_a_task_that_lmms_eval_does_not_have(quickly, tmp_path, capsys):
    assert cli.main(["evaluate", "model", "--tasks", "pop", "--out", str(tmp_path / "run")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "tasks has 'pop', which is neither a file here nor a task of lmms-eval (similar: pope" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_where_nothing_is_reached_all_of_it_is_said(quickly, tmp_path, monkeypatch, capsys):
    model, out = str(save_llava(tmp_path / "model")), tmp_path / "run"
    on_disk(tmp_path, monkeypatch, ())
    assert cli.main(["evaluate", model, "--tasks", "mmvp,pope", "--out", str(out)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "not reached: mmvp: its data or settings cannot be loaded (ConnectionError: Couldn't reach" in said
    assert "not reached: pope: its data" in said
    run = RunDirectory.open(out)
    assert (list(run.info["unreached"]), run.read_rows(), run.read_answers()) == (["mmvp", "pope"], [], [])


@pytest.mark.slow
def test_a_folder_of_more_tasks_that_is_not_there(quickly, tmp_path, capsys):
    command = ["evaluate", "model", "--tasks", "mine", "--include-path", str(tmp_path / "gone")]
    assert cli.main([*command, "--out", str(tmp_path / "run")]) == 2
    assert "gone' is no folder; give the one with the tasks' YAML files" in capsys.readouterr().err


@pytest.mark.slow
def test_the_paper_s_benchmarks_as_far_as_they_can_be_reached(quickly, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, out = str(save_llava(tmp_path / "model")), tmp_path / "run"
    command = ["evaluate", model, "--tasks", "paper", "--out", str(out), "--batch-size", "2", "--prune-keep", "0.5"]
    command += ["--prune-layer", "1"]
    with monkeypatch.context() as only:
        on_disk(tmp_path, only, ("mmvp", "pope"))
        assert cli.main(command) == 1
    said = capsys.readouterr().out
    run = RunDirectory.open(out)
    assert list(run.info["unreached"]) == [name for name in NINE if name not in ("mmvp", "pope")]
    assert "not reached: gqa: its data or settings cannot be loaded (ConnectionError: Couldn't reach" in said
    assert "'lmms-lab-encoder/GQA' on the Hub" in " ".join(said.split())
    rows = {(row.metric, row.target, row.variant): row for row in run.read_rows()}
    assert rows["answer_accuracy", "pope", ""].n == 4
    assert rows["harness_score", "mmvp_corrected", "mmvp_pair_accuracy"].value is not None
    assert rows["pair_accuracy", "mmvp_corrected", ""].n == 2
    assert not any(row.target.split(",")[0] == "mmvp" for row in run.read_rows())
    assert run.info["counts"]["questions"] == 8
    assert set(run.load().per_image.images) > {"pair 0", "pair 1"}
    kept = {name: (out / "harness" / f"{name}.json").stat().st_mtime_ns for name in ("mmvp", "pope")}
    with monkeypatch.context() as more:  # the data of one more, and none of what is done
        on_disk(tmp_path, more, ("ai2d",))
        assert cli.main([*command, "--resume"]) == 1
    assert {name: (out / "harness" / f"{name}.json").stat().st_mtime_ns for name in kept} == kept
    again = {(row.metric, row.target, row.variant): row for row in run.read_rows()}
    assert again.keys() > rows.keys()
    assert again["answer_accuracy", "ai2d", ""].n == 3
    assert all(again[key] == row for key, row in rows.items())
    assert not [path for path in tmp_path.iterdir() if path.name in ("submissions", "results", "logs")]
