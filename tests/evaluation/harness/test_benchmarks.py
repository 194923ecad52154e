"""lmms-eval's own code for each of the nine, on small data of the same format: scores equal those by hand."""

import pytest

pytest.importorskip("lmms_eval.evaluator", reason="needs lmms-eval: make test-harness", exc_type=ImportError)

from keepsight.evaluation.harness.paper import benchmarks
from keepsight.evaluation.harness.result import load_results, save_results
from keepsight.evaluation.harness.tasks import known_tasks, run_task
from tests.evaluation.harness.benchmarks import BENCHMARKS, on_disk, picture

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def manager():
    return known_tasks()


def scripted(task: str, said: list[str]):
    """A model of lmms-eval that gives these answers, and keeps what it was shown."""
    from lmms_eval.api.model import lmms

    class Scripted(lmms):
        is_simple = False
        shown: list = []  # noqa: RUF012

        def generate_until(self, requests):
            docs = [self.task_dict[task][request.args[5]][request.args[3]] for request in requests]
            self.shown += [request.args[1](doc) for request, doc in zip(requests, docs, strict=True)]
            return [said[request.args[3]] for request in requests]

        loglikelihood = generate_until_multi_round = None

    return Scripted()


@pytest.fixture
def result(request, manager, tmp_path, monkeypatch):
    on_disk(tmp_path, monkeypatch, (request.param,))
    lm = scripted(request.param, BENCHMARKS[request.param].said)
    [found] = run_task(lm, request.param, manager, tmp_path / "files")
    return found, lm.shown


def run(name):
    return pytest.mark.parametrize("result", [name], indirect=True)


@pytest.mark.parametrize("result", BENCHMARKS, indirect=True)
def test_scores_are_those_by_hand(result):
    found, shown = result
    small = BENCHMARKS[found.task]
    for metric, value in small.scores.items():
        assert found.numbers[metric][0] == pytest.approx(value, abs=1e-6), metric
    main = next(one for one in benchmarks() if one.task == found.task)
    assert main.metric in small.scores
    assert [one.prediction for one in found.answered] == [
        said if found.task != "ai2d" else said[0] for said in small.said
    ]
    assert len(shown) == len(small.rows)
    assert all(one.picture for one in found.answered)
    rows = {(row.metric, row.target): row for row in found.evaluation().rows}
    mean = sum(one.score for one in found.answered) / len(found.answered)
    accuracy = rows["answer_accuracy", ""]
    assert accuracy.value == pytest.approx(mean)
    assert accuracy.low < accuracy.value < accuracy.high


@run("mmvp")
def test_mmvp_is_marked_and_told_by_pair(result):
    found, _ = result
    assert found.name == "mmvp_corrected"
    assert [one.pair for one in found.answered] == ["0", "0", "1", "1"]
    rows = {row.metric: row for row in found.evaluation().rows}
    assert (rows["pair_accuracy"].value, rows["pair_accuracy"].n) == (0.5, 2)
    assert found.numbers["mmvp_pair_accuracy"][1:] == (rows["pair_accuracy"].low, rows["pair_accuracy"].high)
    assert all("corrected labels" in row.note for row in found.evaluation().rows)
    assert list(found.evaluation().per_image.images) == ["pair 0", "pair 1"]


@run("mmmu_val")
def test_mmmu_places_its_pictures_and_tells_its_subjects(result):
    found, shown = result
    kinds = [part["type"] for part in shown[0][0]["content"]]
    assert kinds == ["text", "image", "text", "image", "text"]
    assert shown[0][0]["content"][0]["text"] == "In"
    assert shown[0][0]["content"][-1]["text"].endswith("A. one\nB. two\nC. three\n\nAnswer with the option's letter "
                                                       "from the given choices directly.")  # fmt: skip
    assert [one.score for one in found.answered] == [1, 0, 1]
    kinds = {row.target: row.value for row in found.evaluation().rows if row.metric == "answer_accuracy"}
    assert kinds == {"": pytest.approx(2 / 3), "Accounting": 0.5, "Math": 1.0}


@run("mmstar")
def test_mmstar_averages_categories_with_an_interval_of_its_own(result):
    found, _ = result
    value, low, high = found.numbers["average"]
    assert value == 0.75
    assert low <= 0.75 <= high
    assert [one.score for one in found.answered] == [1, 0, 1]


@run("pope")
def test_pope_clusters_by_picture_and_has_f1(result):
    found, _ = result
    assert found.answered[0].picture == found.answered[1].picture != found.answered[2].picture
    assert len(found.evaluation().per_image.images) == 2
    value, low, high = found.numbers["pope_f1_score"]
    assert low <= value <= high


@run("gqa")
def test_gqa_joins_questions_and_pictures(result):
    _, shown = result
    assert [turns[0]["content"][0]["url"].size for turns in shown] == [picture(i).size for i in (0, 0, 1, 1)]
    assert shown[0][0]["content"][1]["text"] == "Is it overcast?\nAnswer the question using a single word or phrase."


@run("textvqa_val")
def test_a_result_is_kept_and_read_again(result, tmp_path):
    found, _ = result
    save_results([found, found], tmp_path / "kept.json")
    again, same = load_results(tmp_path / "kept.json")
    assert again == same == found
    assert again.evaluation().rows == found.evaluation().rows
    assert not list(tmp_path.glob("submissions")), "written where it was told"
