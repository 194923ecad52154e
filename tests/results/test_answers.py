"""Answers on the disk, and two runs' answers set against each other."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from keepsight.results import AnswerRecord, RunDirectory
from keepsight.results.answers import clusters
from keepsight.results.changes import answer_difference, changes
from keepsight.results.intervals import bootstrap_ratio, mean_interval, ratio_shares
from keepsight.results.thumbnails import LONGEST_SIDE


def record(number: int, right: bool, kind: str = "", task: str = "t", **more) -> AnswerRecord:
    return AnswerRecord(task, str(number), "what ?", "x", ("y",), float(right), type=kind, **more)


def test_round_trip_and_an_edited_file(tmp_path):
    run = RunDirectory.create(tmp_path / "run", label="a", kind="evaluation")
    assert run.read_answers() == []
    one = record(0, True, picture="a.png", images=("a.png", "é\n.png"), choices=("p", "q"))
    other = AnswerRecord("t", "1", "w", left_out="the question is empty", reference=("",))
    run.write_answers([one, other])
    assert run.read_answers() == [one, other] == list(run.load().answers)
    file = run.path / "answers.jsonl"
    good = file.read_text(encoding="utf-8")
    for line, why in (
        (good[:40], "this line is no answer"),
        ("[1]", "this line is no answer"),
        ('{"task": "t", "id": "2", "question": "w", "new": 1}', "unexpected keyword argument 'new'"),
        (
            '{"task": "t", "id": "2", "question": "w", "score": 2}',
            "score is 2; texts are strings, score is from 0 to 1",
        ),
        ('{"task": "t", "id": 2, "question": "w"}', "id is 2; texts are strings"),
        ('{"task": "t", "id": "2", "question": "w", "images": [[]]}', r"images is \(\[\],\)"),
    ):
        file.write_text(good + line + "\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"answers\.jsonl:3: .*" + why):
            run.load()


def test_thumbnails(tmp_path):
    run = RunDirectory.create(tmp_path / "run", label="a", kind="evaluation")
    assert run.load().thumbnails is None
    small = Image.effect_noise((20, 10), 90).convert("RGB")
    large = Image.new("RGB", (3000, 1500), (200, 30, 30))
    assert run.write_thumbnails([("t", "../../small", small), ("t", "large", large), ("u", "large", small)]) == 3
    kept = run.load().thumbnails
    assert np.array_equal(kept.get("t", "../../small"), small)
    assert kept.get("t", "large").size == (LONGEST_SIDE, LONGEST_SIDE // 2)
    assert np.abs(np.asarray(kept.get("t", "large"), dtype=int) - (200, 30, 30)).max() < 4
    assert kept.get("u", "large").size == (20, 10)
    assert kept.get("u", "small") is None
    assert (run.path / "thumbnails.zip").stat().st_size < 20_000
    (run.path / "thumbnails.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"thumbnails\.zip' cannot be read .*Remove it"):
        kept.get("t", "large")


def test_clusters_by_hand():
    pictures = ["a", "a", "b", "c", "d", None, None, None]
    pairs = [None, None, 1, 1, None, None, 2, 2]
    found = clusters(pictures, pairs, [str(i) for i in range(8)])
    a, b, d, pair = ("picture", "a"), ("picture", "b"), ("picture", "d"), ("pair", 2)
    assert found == [a, a, b, b, d, ("question", "5"), pair, pair]


def test_what_changed_by_hand():
    before = [record(i, right, kind) for i, (right, kind) in enumerate(zip((1, 1, 0, 0, 1), "xxyyy", strict=True))]
    after = [record(i, right, kind) for i, (right, kind) in enumerate(zip((1, 0, 1, 1, 1), "xxyyy", strict=True))]
    whole, x, y = changes(before, after)
    assert [(c.target, c.type, c.questions, c.before, c.after) for c in (whole, x)] == [
        ("", "", 5, 0.6, 0.8),
        ("x", "x", 2, 1.0, 0.5),
    ]
    assert (y.before, y.after, y.difference.value) == pytest.approx((1 / 3, 1.0, 2 / 3))
    assert [pair[0].id for pair in whole.only_before] == ["1"]
    assert [pair[1].id for pair in whole.only_after] == ["2", "3"]
    assert [len(c.only_before) for c in (x, y)] == [1, 0]
    assert whole.elsewhere == 0
    assert answer_difference(before, after, "x").value == -0.5


def test_only_the_same_questions_are_compared():
    before = [record(i, True) for i in range(4)]
    reworded = dataclasses.replace(record(1, False), question="which ?")
    other_truth = dataclasses.replace(record(2, False), reference=("z",))
    not_asked = dataclasses.replace(record(3, False), score=None, left_out="the picture is missing")
    (whole,) = changes(before, [record(0, False), reworded, other_truth, not_asked])
    assert (whole.questions, whole.elsewhere) == (1, 5)  # three of the first run's, two of the second's
    assert answer_difference(before, [record(0, False)]) is None
    assert changes(before, []) == []
    # One task in each is the same one, whatever its file is called; of several, names decide.
    assert len(changes(before, [record(i, False, task="renamed") for i in range(4)])) == 1
    two = [record(0, False, task="u"), record(0, False, task="v")]
    assert changes(before, two) == []
    assert [c.target for c in changes(two, two)] == ["u", "v"]


def simulated(pictures: int, questions: int) -> tuple[list[AnswerRecord], list[AnswerRecord]]:
    """Pictures that are hard or easy for both runs alike, and a second run that is right somewhat more often."""
    rng = np.random.default_rng(5)
    hard = np.repeat(rng.beta(1, 1, pictures), questions)
    draws = rng.random((2, pictures * questions))
    runs = draws[0] < hard, draws[1] < np.clip(hard + 0.1, 0, 1)
    one, other = ([record(i, r, picture=str(i // questions)) for i, r in enumerate(run)] for run in runs)
    return one, other


def test_the_bootstrap_agrees_with_the_linearised_interval_and_a_loop():
    before, after = simulated(300, 4)
    found = answer_difference(before, after)
    gained = np.array([b.score - a.score for a, b in zip(before, after, strict=True)])
    assert found.value == pytest.approx(gained.mean())
    sums = gained.reshape(300, 4).sum(axis=1)
    linear = mean_interval(ratio_shares(sums, np.full(300, 4.0)))
    width = linear.high - linear.low
    assert (found.low, found.high) == pytest.approx((linear.low, linear.high), abs=0.08 * width)
    rng = np.random.default_rng(9)
    loop = [gained.reshape(300, 4)[rng.integers(300, size=300)].mean() for _ in range(2000)]
    assert (found.low, found.high) == pytest.approx(np.quantile(loop, (0.025, 0.975)), abs=0.08 * width)
    assert answer_difference(before, after) == found  # seeded


def test_questions_of_a_picture_or_a_pair_are_drawn_together():
    """Twenty copies of each question say no more than one; apart they would claim to be 4.5 times as sure."""
    gains = np.random.default_rng(2).integers(-1, 2, size=60)
    for by in ("picture", "pair"):
        runs = [
            [record(20 * i + j, right(gain), **{by: str(i)}) for i, gain in enumerate(gains) for j in range(20)]
            for right in (lambda gain: gain < 0, lambda gain: gain > 0)
        ]
        copies = answer_difference(*runs)
        once = bootstrap_ratio(gains.astype(float), np.ones(60))
        assert (copies.low, copies.high) == pytest.approx((once.low, once.high))
        alone = answer_difference(*([dataclasses.replace(r, **{by: None}) for r in run] for run in runs))
        assert (once.high - once.low) / (alone.high - alone.low) == pytest.approx(20**0.5, rel=0.1)


def test_no_certainty_where_nothing_differs():
    same = [record(i, i % 2) for i in range(10)]
    found = answer_difference(same, same)
    assert (found.value, found.low, found.high, found.note) == (0.0, None, None, "no interval: all clusters agree")
