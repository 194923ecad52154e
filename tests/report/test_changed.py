"""What changed between two runs that answered the same questions: the page, and the terminal's counts."""

import re

import numpy as np
import pytest
from PIL import Image

from keepsight import cli
from keepsight.evaluation import Question
from keepsight.report import build, table, verdict
from keepsight.report.changed import CARDS, OF_A_TYPE, changed
from keepsight.report.curves import open_runs
from keepsight.results.arms import pool
from tests.report.answers import sample_answers, write_run
from tests.report.test_page import HOSTILE, Page


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return sample_answers(tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    return Page(build(runs, tmp_path_factory.mktemp("page") / "r.html").read_text(encoding="utf-8"))


def records(runs):
    return [{record.id: record for record in run.read_answers()} for run in runs]


def test_every_flip_is_counted_and_shown(runs, page):
    first, second = records(runs)
    flips = {i for i in first if first[i].correct != second[i].correct}
    (found,) = changed(open_runs(runs))
    gains, losses = found.directions
    assert (
        gains.count == sum(second[i].correct for i in flips) > losses.count == sum(first[i].correct for i in flips) > 0
    )
    assert (found.lines[0].only_before, found.lines[0].only_after) == (losses.count, gains.count)
    assert sum(line.only_after for line in found.lines[1:]) == gains.count
    assert gains.shown == gains.count
    text = " ".join("".join(page.text).split())
    for i in flips:
        assert " ".join(first[i].question[:100].split()) in text
    assert f"{gains.count} questions, all shown" in text
    shots = [a["href"] for tag, a in page.tags if tag == "image"]
    assert len(shots) == len(flips) + 1  # one of the questions has two pictures
    assert all(shot.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for shot in shots)
    assert [a["id"] for tag, a in page.tags if tag == "section"] == ["verdict", "answers", "changed", "origin"]
    assert "… (863 characters)" in text  # a long question is cut, and says so


@pytest.mark.slow
def test_a_page_of_many_flips_stays_small(tmp_path):
    noise = np.random.default_rng(0)
    questions = [
        Question(
            f"q {i}", "a", Image.fromarray(noise.integers(0, 255, (600, 800, 3), dtype=np.uint8)), f"type {i % 30}"
        )
        for i in range(120)
    ]
    right = np.arange(120) < 119
    pair = [write_run(tmp_path / name, name, questions, r) for name, r in (("one", ~right), ("two", right))]
    (found,) = changed(open_runs(pair))
    gains, losses = found.directions
    assert (gains.count, gains.shown, losses.shown) == (119, CARDS // 2, 1)
    assert {len(kind.cards) for kind in gains.kinds} == {0, 1}  # 30 types share the room
    assert build(pair, tmp_path / "r.html").stat().st_size < 1_000_000  # JPEG of noise
    one_type = [Question(q.question, "a", None, "same") for q in questions]
    pair = [write_run(tmp_path / f"{name}-1", name, one_type, r) for name, r in (("one", ~right), ("two", right))]
    assert changed(open_runs(pair))[0].directions[0].shown == OF_A_TYPE
    text = Page(build(pair, tmp_path / "r.html").read_text(encoding="utf-8")).text
    assert "119 questions, 6 shown" in " ".join("".join(text).split())


def test_hostile_strings_are_text(tmp_path):
    picture = Image.new("RGB", (8, 8))
    questions = [
        Question(HOSTILE + str(i), answer, picture, HOSTILE, HOSTILE, choices, id=HOSTILE + str(i))
        for i, (answer, choices) in enumerate([(HOSTILE, ()), (HOSTILE + "2", (HOSTILE, HOSTILE + "2"))])
    ]
    pair = [
        write_run(tmp_path / str(i), HOSTILE + str(i), questions, np.array([i, i]), wrong=HOSTILE + "3") for i in (0, 1)
    ]
    page = Page(build(pair, tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "changed" in [a["id"] for tag, a in page.tags if tag == "section"]
    assert not [tag for tag, a in page.tags if tag == "img" or any(name.startswith("on") for name in a)]
    assert "alert" not in "".join(text for a, text in page.scripts if a.get("id") != "data")
    assert "".join(page.text).count(HOSTILE + "3") == 2
    assert "".join(page.text).count("{{7*7}}") > 10


def test_what_is_missing_is_said(runs, tmp_path):
    """No pictures, no shared questions, replicates, one run."""
    questions = [Question("q", "a", Image.new("RGB", (8, 8)), picture="p")]
    pair = [write_run(tmp_path / str(i), str(i), questions, np.array([i])) for i in (0, 1)]
    for run in pair:
        (run.path / "thumbnails.zip").unlink()
    assert "1 picture not shown" in build(pair, tmp_path / "r.html").read_text(encoding="utf-8")
    other = write_run(tmp_path / "other", "other", [Question("another", "a")], np.array([1]))
    assert changed(open_runs([pair[0], other])) == []
    assert changed(open_runs([runs[0]])) == []
    replicates = [run.load() for run in runs]
    assert list(pool(replicates).answers) == []


def test_compare_tells_types_counts_and_a_verdict_without_layers(runs, tmp_path, capsys):
    out = tmp_path / "both.html"
    assert cli.main(["compare", *(str(run.path) for run in runs), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    (found,) = changed(open_runs(runs))
    for line in found.lines:
        cells = [re.escape(line.title), line.questions, line.only_before, line.only_after, re.escape(line.difference)]
        assert re.search("[ │]+".join(map(str, cells)), text), line.title
    assert "Answers, where" in text
    assert "F1 of “yes”, is there" in text
    assert "layer" not in verdict(runs)
    assert found.lines[0].difference in verdict(runs)
    assert "What changed" in out.read_text(encoding="utf-8")
    assert table([runs[0]]).row_count > 8
