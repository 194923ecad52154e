"""Question files: what they may hold, and what is wrong with them."""

import json

import pytest
from PIL import Image

from keepsight.evaluation import Question, load_questions
from keepsight.evaluation.questions import askable
from keepsight.images import ImageError


def write(path, *entries):
    path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries), encoding="utf-8")
    return path


def test_fields(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    file = write(
        tmp_path / "q.jsonl",
        {"question": "what ?", "answer": "cat", "image": "a.png", "type": "what", "id": 7},
        "",
        {"question": "which ?", "answer": 1, "choices": ["x", 2], "picture": "p", "score": "choice", "pair": 3},
        {"question": "many", "answers": ["a", "b"], "images": ["a.png", "a.png"]},
        {"question": "how many ?", "answer": 3, "extra": "left alone"},
    )
    one, two, three, four = load_questions(file)
    assert (one.question, one.answers, one.kind, one.id, one.picture) == ("what ?", ("cat",), "what", "7", "a.png")
    assert one.images[0]() == tmp_path / "a.png"
    assert (two.choices, two.answer, two.picture, two.pair, two.id) == (("x", "2"), "2", "p", 3, "1")
    assert (three.answers, len(three.images), three.picture) == (("a", "b"), 2, "a.png")
    assert (four.answers, four.images, four.picture) == (("3",), (), None)


def test_half_a_character_is_replaced(tmp_path):
    (one,) = load_questions(
        write(tmp_path / "q.jsonl", '{"question": "what \\ud800 \\ud83d\\ude00 ?", "answer": "\\u00e9"}')
    )
    assert (one.question, one.answer) == ("what \ufffd \U0001f600 ?", "\u00e9")


def test_a_data_set_of_pictures():
    picture = Image.new("RGB", (4, 4))
    (found,) = load_questions([{"question": "what ?", "answer": "cat", "image": picture, "id": None}])
    assert found.images == (picture,)
    assert found.id == "0"


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("{", r"q.jsonl:1: this line is not JSON"),
        ([1], r"q.jsonl:1: expected an object such as"),
        ({"answer": "a"}, r"q.jsonl:1: 'question' is missing; it has the fields \['answer'\]"),
        ({"question": "q"}, r"'answer' is missing"),
        ({"question": "q", "answer": "a", "answers": ["b"]}, r"it has both 'answer' and 'answers'"),
        (
            {"question": "q", "answer": 5, "choices": ["a", "b"]},
            r"the answer is position 5; there are 2 choices, from 0",
        ),
        (
            {"question": "q", "answer": "A", "choices": {"A": "x", "B": "y"}},
            r"choices are a list of texts; got \"\{'A'",
        ),
        ({"question": "q", "answer": "a", "choices": "abc"}, r"choices are a list of texts; got 'abc'"),
        ({"question": "q", "answer": "a", "pair": [1]}, r"pair is a name, a text or a number; got '\[1\]'"),
        ({"question": "q", "answer": "a", "picture": {"x": 1}}, r"picture is a name, a text or a number; got"),
        ({"question": "q", "answer": {"a": 1}}, r"question, answer and choices are texts; got \{'a': 1\}"),
        (
            {"question": "q", "answer": "a", "score": "bleu"},
            r"score is 'bleu'; allowed: exact, contains, yes_no, vqa, choice",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, entry, why):
    with pytest.raises(ValueError, match=why):
        load_questions(write(tmp_path / "q.jsonl", entry))


def test_no_file_no_questions_and_paths_outside(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_questions(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="holds no questions; write one JSON object a line"):
        load_questions(write(tmp_path / "q.jsonl", ""))
    (found,) = load_questions(write(tmp_path / "q.jsonl", {"question": "q", "answer": "a", "image": "../secret.png"}))
    with pytest.raises(ImageError, match="leaves the image folder"):
        found.images[0]()


def test_what_cannot_be_asked_is_left_out():
    questions = [Question("q", "a", id="x"), Question("q", "", id="y"), Question("q", "b", id="x"), Question("r", "a")]
    asked, refused = askable(questions)
    assert asked == [0, 3]
    assert refused == {1: "the right answer is empty", 2: "its id is that of question 1"}


@pytest.mark.parametrize(
    ("text", "pictures", "why"),
    [
        ("is <image> red ?", 2, "it has 1 <image> and 2 pictures; as many are needed"),
        ("is <image> like <image> ?", 1, "it has 2 <image> and 1 pictures; as many are needed"),
        ("<image> ?", 0, "it has 1 <image> and 0 pictures; as many are needed"),
        (" ", 1, "the question is empty"),
    ],
)
def test_marks_that_do_not_fit_the_pictures(text, pictures, why):
    question = Question(text, "a", image=[Image.new("RGB", (4, 4))] * pictures)
    assert askable([question, Question("q", "a", image=question.image)]) == ([1], {0: why})
