"""Groups of tasks: told part by part, kept for --resume, the same of two processes; their pictures are kept."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("lmms_eval.evaluator", reason="needs lmms-eval: make test-harness", exc_type=ImportError)

from keepsight import cli
from keepsight.results import RunDirectory
from tests.evaluation.harness.local import QUESTIONS, local_tasks
from tests.tiny_processors import save_llava

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("group")
    tasks = ["--tasks", "tiny_group", "--include-path", str(local_tasks(folder / "tasks"))]
    return ["evaluate", str(save_llava(folder / "model")), *tasks, "--batch-size", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "run"
    assert cli.main([*command, "--out", str(out)]) == 0
    return RunDirectory.open(out)


def test_parts_are_told_one_by_one(alone):
    rows = {(row.metric, row.target): row for row in alone.read_rows()}
    assert rows["answer_accuracy", "tiny_one"].n == QUESTIONS["tiny_one"]
    # Points are none of one question's share: the task's own number stands alone.
    assert ("answer_accuracy", "tiny_two") not in rows
    own = rows["harness_score", "tiny_two"]
    said = [one["prediction"] for one in kept(alone)["tiny_two"]["answered"]]
    assert own.value == pytest.approx(10 * sum(map(len, said)) / len(said))
    assert alone.info["finished"]


def kept(run):
    return {part["task"]: part for part in json.loads((run.path / "harness" / "tiny_group.json").read_text())}


def test_a_finished_group_is_not_asked_again(alone, command, monkeypatch):
    def asked(*_):
        raise AssertionError("asked again")

    rows = alone.read_rows()
    monkeypatch.setattr("keepsight.evaluation.harness.tasks.run_task", asked)
    assert cli.main([*command, "--out", str(alone.path), "--resume"]) == 0
    assert alone.read_rows() == rows


def test_answers_have_their_pictures(alone):
    loaded = alone.load()
    assert [answer.task for answer in loaded.answers] == ["tiny_one"] * QUESTIONS["tiny_one"]
    names = [answer.images[0] for answer in loaded.answers]
    assert len(set(names)) == 3, "two questions a picture, the last has its own"
    assert names[0] == names[1]
    assert [loaded.thumbnails.get("tiny_one", name).size for name in names[::2]] == [(20, 16), (21, 16), (22, 16)]


def test_two_processes_give_what_one_gives(alone, command, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "keepsight"]
    settings = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, *command, "--out", str(tmp_path / "two")], env=settings, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = RunDirectory.open(tmp_path / "two")
    assert two.read_rows() == alone.read_rows()
    assert two.read_answers() == alone.read_answers()
    assert kept(two) == kept(alone)
