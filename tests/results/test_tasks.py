"""A task alone in one run and beside others in another: told as one."""

from dataclasses import replace

import pytest

from keepsight.report import verdict
from keepsight.report.curves import open_runs
from keepsight.report.tables import answers
from keepsight.results.answers import target_of
from keepsight.results.tasks import ANSWER_METRICS, tasks_named
from tests.report.answers import sample_answers


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One task; the same one beside another, as an evaluation of both names it; each with a row of a diagnosis."""
    alone, other = [run.load() for run in sample_answers(tmp_path_factory.mktemp("runs"))]
    probe = replace(alone.rows[0], metric="probe_accuracy", target="color", layer=1)
    rows = [replace(row, target=target_of("sample", row.target, 2)) for row in other.rows]
    rows += [replace(other.rows[0], target="more", value=0.25)]
    kept = other.per_image.renamed(lambda kind: target_of("sample", kind, 2))
    several = [*other.answers, replace(other.answers[0], task="more")]
    return [
        replace(alone, rows=[*alone.rows, probe]),
        replace(other, rows=[*rows, probe], per_image=kept, answers=several),
    ]


def test_it_gets_its_name_in_both(runs):
    alone, several = tasks_named(runs)
    assert several is runs[1]
    named = {(row.metric, row.target) for row in alone.rows if row.metric in ANSWER_METRICS}
    assert named == {(row.metric, row.target) for row in several.rows if row.target not in ("more", "color")}
    assert ("answer_accuracy", "sample") in named
    assert [row.target for row in alone.rows if row.metric == "probe_accuracy"] == ["color"]
    assert set(alone.per_image.keys) == set(several.per_image.keys)
    assert tasks_named([alone, several])[0] is alone


def test_a_lone_task_among_lone_tasks_stays_as_it_is(runs):
    assert tasks_named(runs[:1] * 2) == runs[:1] * 2


def test_the_difference_is_told(runs):
    first, second = ({row.target: row.value for row in run.rows if row.metric == "answer_accuracy"} for run in runs)
    (line,) = [line for line in answers(open_runs(runs)) if line.title == "Answers, sample"]
    assert f"{100 * (second['sample'] - first['']):+.1f}" in line.differences[0].value
    assert "Nothing can be said" not in verdict(runs)
