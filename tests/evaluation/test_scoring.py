"""Scores by hand, and rows against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from keepsight.evaluation import Question, QuestionError
from keepsight.evaluation.scoring import Record, chosen, rows_of, score, yes_or_no

CHOICES = ("a cat", "two dogs", "a cat and a dog")


@pytest.mark.parametrize(
    ("said", "place"),
    [
        ("B", 1),
        ("b", 1),
        ("(C)", 2),
        ("B. two dogs", 1),
        ("The answer is B", 1),
        ("Answer: (c).", 2),
        ("option A, clearly", 0),
        ("Answer: A cat and a dog", 2),
        ("a cat", 0),
        ("Two dogs.", 1),
        ("I see two dogs there", 1),
        ("a cat and a dog", 2),
        ("it is a cat and a dog, I think", 2),  # "cat" occurs in the choice that occurs
        ("a cat, or two dogs", None),
        ("A cat", 0),  # an article, not a letter
        ("**B**", 1),
        ("**Answer:** `B`.", 1),
        ("The answer is **(B) a dog**", 1),
        ("a bird", None),
        ("", None),
        ("D", None),
        ("B\n\nThere are two.", 1),
        ("The correct option is C", 2),
    ],
)
def test_chosen(said, place):
    assert chosen(said, CHOICES) == place


@pytest.mark.parametrize(
    ("text", "found"),
    [("Yes.", True), ("no, yes", False), ("I know nothing", None), ("", None), ("The answer: no", False)],
)
def test_yes_or_no(text, found):
    assert yes_or_no(text) is found


def test_vqa_accuracy_by_hand():
    """Ten annotators, two of whom say "red": leaving one of them out 1/3 (twice), else 2/3 (eight times): 0.6."""
    question = Question("what colour ?", ["red"] * 2 + ["blue"] * 5 + ["green"] * 3)
    assert question.scored_by == "vqa"
    assert score(question, "The red") == pytest.approx((2 * (1 / 3) + 8 * (2 / 3)) / 10)
    assert score(question, "blue") == 1.0
    assert score(question, "green") == pytest.approx((3 * (2 / 3) + 7 * 1) / 10)
    assert score(question, "pink") == 0.0
    assert score(Question("what ?", ["red", "blue"]), "blue") == 1.0  # two: any match


def test_other_scores():
    assert Question("is it red ?", "Yes").scored_by == "yes_no"
    assert score(Question("is it red ?", "no"), "No, it is not.") == 1.0
    assert score(Question("is it red ?", "no"), "maybe") == 0.0
    assert score(Question("read", "Stop", score="contains"), "The sign says STOP!") == 1.0
    assert score(Question("read", ["Stop", "Halt"], score="contains"), "sto p") == 0.0
    assert score(Question("how many ?", "two"), "2.") == 1.0
    assert score(Question("which ?", "b", choices=CHOICES), "two dogs") == 1.0
    assert score(Question("which ?", "Two dogs", choices=CHOICES), "A") == 0.0


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("A", ""), ("A", "The."), ("+", "-"), ("-5", "5"), ("5", "-5")],
)
def test_what_normalises_to_little_is_not_the_same(right, wrong):
    question = Question("q", right, score="exact")
    assert (score(question, right), score(question, wrong)) == (1.0, 0.0)


def test_choices_that_differ_by_signs():
    for choices in (("1", "-1"), ("+", "-"), ("$5", "5%"), ("re\u0301d", "red")):
        assert [chosen(choice, choices) for choice in choices] == [0, 1]
    assert chosen("it is 5", ("$5", "5%")) is None


def test_a_tried_choice_is_taken_as_it_is():
    """Among the choices "b" and "a" the text "a" is the second, and as a letter the first."""
    question = Question("which comes first ?", "a", choices=("b", "a"))
    assert question.right_choice() == 1
    assert (score(question, "a"), score(question, "a", tried=True)) == (0.0, 1.0)
    assert score(question, "b", tried=True) == 0.0


@pytest.mark.parametrize("count", [26, 27, 28, 29, 70])
def test_many_choices_have_letters_to_z(count):
    many = [f"thing{number}" for number in range(count)]
    assert (chosen("Z", many), chosen("thing26", many)) == (25, 26 if count > 26 else None)


@pytest.mark.parametrize(
    ("question", "why"),
    [
        (Question(" ", "a"), "the question is empty"),
        (Question("q", " "), "the right answer is empty"),
        (Question("q", ["", ""]), "the right answer is empty"),
        (Question("q", "a", choices=("a",)), "there is one choice ('a'); give two or more, or none"),
        (
            Question("q", "z", choices=("x", "y")),
            "the answer 'z' is none of the choices ['x', 'y'], nor the letter of one",
        ),
        (Question("q", "a", choices=("a", " ")), "choice 2 is empty"),
        (Question("q", "a", score="choice"), "it is scored by choice and has no choices"),
        (Question("q", "red", score="yes_no"), "it is scored by yes or no, and its answer is 'red'"),
        (Question("q", "a", choices=("a", "<image>")), "it has 1 <image> and 0 pictures; as many are needed"),
        (Question("<image> q", "a"), "it has 1 <image> and 0 pictures; as many are needed"),
        (Question("<image> q", "a", image=["x.png", "y.png"]), "it has 1 <image> and 2 pictures; as many are needed"),
    ],
)
def test_questions_that_cannot_be_asked(question, why):
    with pytest.raises(QuestionError) as error:
        question.check()
    assert str(error.value) == why


def records(n_pictures: int = 30, seed: int = 0) -> list[Record]:
    rng = np.random.default_rng(seed)
    found = []
    for picture in range(n_pictures):
        for _ in range(3):
            truth, said = rng.random(2) < (0.5, 0.4)
            question = Question("is it ?", "yes" if truth else "no", kind="is", picture=picture, pair=picture)
            said = "yes" if said else "no"
            found.append(Record(question, said, score(question, said)))
    return found


def test_f1_is_that_of_scikit_learn():
    answered = records()
    rows, per_image = rows_of(answered)
    found = {row.metric: row for row in rows if row.target == "is"}
    truth = [record.question.answer == "yes" for record in answered]
    said = [record.prediction == "yes" for record in answered]
    assert found["answer_f1"].value == pytest.approx(f1_score(truth, said))
    assert found["answer_yes"].value == pytest.approx(np.mean(said))
    assert found["answer_accuracy"].value == pytest.approx(np.mean(np.equal(truth, said)))
    assert found["answer_f1"].low < found["answer_f1"].value < found["answer_f1"].high
    for row in rows:
        if row.key in per_image:
            assert np.nanmean(per_image.of(row.key)) == pytest.approx(row.value, abs=1e-6)


@pytest.mark.slow
def test_f1_interval_covers():
    truth = f1_score(*zip(*[(r.question.answer == "yes", r.prediction == "yes") for r in records(20000)], strict=True))
    covered = 0
    for seed in range(1, 201):
        (row,) = [r for r in rows_of(records(40, seed))[0] if (r.metric, r.target) == ("answer_f1", "")]
        covered += row.low <= truth <= row.high
    assert 0.90 <= covered / 200 <= 0.99


def test_no_yes_anywhere_has_no_f1():
    question = Question("is it ?", "no")
    rows, _ = rows_of([Record(question, "no", 1.0)] * 3)
    (row,) = [row for row in rows if row.metric == "answer_f1"]
    assert (row.value, row.note) == (None, "neither the answers nor the truth has a yes")


def test_an_f1_that_no_picture_varies_claims_no_certainty():
    questions = [Question("is it ?", "yes", picture=picture) for picture in range(3)]
    for said, value in (("no", 0.0), ("yes", 1.0)):
        rows, _ = rows_of([Record(question, said, value) for question in questions])
        (row,) = [row for row in rows if row.metric == "answer_f1"]
        assert (row.value, row.low, row.high, row.note) == (value, None, None, "no interval: all clusters agree")


def test_pairs_are_right_where_both_are():
    def record(pair: int, right: bool) -> Record:
        return Record(Question("q", "a", pair=pair), "a" if right else "b", float(right))

    rows, _ = rows_of([record(0, True), record(0, True), record(1, True), record(1, False), record(2, True)])
    (row,) = [row for row in rows if row.metric == "pair_accuracy"]
    assert (row.value, row.n, row.unit) == (pytest.approx(2 / 3), 3, "pairs")
