import pytest
import torch
from PIL import Image
from scipy.stats import norm

from keepsight.evaluation.vqa import VqaItem, answer_accuracy, interval, normalise, text_only_prior
from keepsight.testbed import models
from keepsight.testbed.folders import vqa_items
from keepsight.testbed.scenes import draw_scenes
from tests.tiny import llava
from tests.tiny_processors import make_llava


@pytest.fixture(scope="module")
def vlm():
    torch.manual_seed(0)
    model, processor = models.join(models.new_encoder(0), models.new_language_model("llama", 0))
    with torch.no_grad():  # sharper logits: answers of an untrained model must not hang on rounding
        model.lm_head.weight.mul_(20)
    return model, processor


def test_normalise():
    assert normalise(" The Top-left. ") == "top left"
    assert normalise("Three") == normalise("3") == "3"
    assert normalise("a  red\nball!") == "red ball"
    assert normalise("anthem") == "anthem"


def test_prior_by_hand():
    train = [
        VqaItem("what color is it ?", "red", kind="color"),
        VqaItem("what color is it ?", "blue", kind="color"),
        VqaItem("What color  is it ?", "blue", kind="color"),
        VqaItem("what color is that ?", "red", kind="color"),
        VqaItem("what color is that ?", "red", kind="color"),
        VqaItem("how many ?", "two", kind="how many"),
    ]
    test = [
        VqaItem("what color is it ?", "blue", kind="color"),  # exact question: blue 2 of 3 → right
        VqaItem("what color is that ?", "blue", kind="color"),  # exact question: red → wrong
        VqaItem("which color ?", "red", kind="color"),  # by type: red 3 of 5 → right
        VqaItem("anything ?", "red", kind="new"),  # of all: red 3 of 6 → right
    ]
    result = text_only_prior(train, test)
    assert [r.prediction for r in result.records] == ["blue", "red", "red", "red"]
    assert [r.correct for r in result.records] == [True, False, True, True]
    rows = {row.target: row for row in result.rows}
    assert (rows[""].value, rows[""].n, rows[""].metric) == (0.75, 4, "answer_prior")
    assert rows["color"].value == pytest.approx(2 / 3)
    assert rows["new"].value == 1.0
    assert list(rows) == ["", "color", "new"]


def test_prior_breaks_ties_by_the_alphabet():
    train = [VqaItem("q", "no"), VqaItem("q", "yes"), VqaItem("q", "yes"), VqaItem("q", "no")]
    assert text_only_prior(train, [VqaItem("q", "yes")]).records[0].prediction == "no"


def test_interval_is_wilson_for_lone_questions():
    z = norm.ppf(0.975)
    n, p = 50, 0.4
    half = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    low, high = ((p + z**2 / (2 * n) + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    assert interval([True] * 20 + [False] * 30, list(range(50))) == pytest.approx((low, high))


def test_interval_counts_pictures_not_questions():
    # 40 pictures with 10 questions each that are all right or all wrong: as uncertain as 40 questions, not as 400.
    correct = [picture < 20 for picture in range(40) for _ in range(10)]
    low, high = interval(correct, [picture for picture in range(40) for _ in range(10)])
    assert high - low == pytest.approx(2 * 1.96 * (0.25 / 40) ** 0.5, rel=0.1)
    # Questions of one picture that behave independently: nearly as certain as 400.
    mixed = [question % 2 == picture % 2 for picture in range(40) for question in range(10)]
    mixed[:3] = [True] * 3
    low, high = interval(mixed, [picture for picture in range(40) for _ in range(10)])
    assert high - low < 0.02
    # All right: never certain.
    assert interval([True] * 40, [i // 2 for i in range(40)])[0] == pytest.approx(interval([True] * 20, range(20))[0])
    assert interval([True] * 40, [i // 2 for i in range(40)])[0] < 0.9
    with pytest.raises(ValueError, match="got 0 answers"):
        interval([], [])


def test_batched_answers_equal_single_ones(vlm):
    model, processor = vlm
    items = vqa_items(draw_scenes(5, 3), turns=5)
    items += [VqaItem("how many ?", "two"), VqaItem("what color is the large red ring in the picture ?", "red")]
    batched = answer_accuracy(model, processor, items, batch_size=6, max_new_tokens=4)
    single = answer_accuracy(model, processor, items, batch_size=1, max_new_tokens=4)
    assert [r.prediction for r in batched.records] == [r.prediction for r in single.records]
    assert len({r.prediction for r in single.records}) > 3  # answers that differ, else equality says nothing
    assert [r.item for r in batched.records] == items
    assert batched.rows == single.rows


@pytest.mark.slow
def test_right_padding_would_have_been_noticed(vlm, monkeypatch):
    model, processor = vlm
    items = vqa_items(draw_scenes(5, 3), turns=5)
    single = answer_accuracy(model, processor, items, batch_size=1, max_new_tokens=4)
    original = type(processor).__call__
    monkeypatch.setattr(
        type(processor), "__call__", lambda self, **given: original(self, **{**given, "padding_side": "right"})
    )
    wrong = answer_accuracy(model, processor, items, batch_size=6, max_new_tokens=4)
    assert [r.prediction for r in wrong.records] != [r.prediction for r in single.records]


def test_scores_exact_matches_and_leaves_the_mode(vlm, tmp_path):
    model, processor = vlm
    records = answer_accuracy(model, processor, vqa_items(draw_scenes(6, 3), turns=2), max_new_tokens=3).records
    item, said = next((r.item, r.prediction) for r in records if normalise(r.prediction))
    item.image.save(tmp_path / "a.png")
    right = VqaItem(item.question, f"{said}.", image=tmp_path / "a.png", kind="x", picture="a")
    wrong = VqaItem(item.question, f"{said} extra", image=str(tmp_path / "a.png"), kind="y", picture="a")
    model.train()
    model.model.vision_tower.eval()  # as when it is frozen
    result = answer_accuracy(model, processor, [right, wrong], max_new_tokens=3)
    assert model.training
    assert not model.model.vision_tower.training
    model.eval()
    assert {row.target: row.value for row in result.rows} == {"": 0.5, "x": 1.0, "y": 0.0}
    assert {row.unit for row in result.rows} == {"questions"}
    assert {row.metric for row in result.rows} == {"answer_accuracy"}


def test_the_picture_matters(vlm):
    model, processor = vlm
    item = VqaItem("what is the top left object ?", "ring", image=Image.new("RGB", (64, 64), "red"))
    other = VqaItem(item.question, "ring", image=Image.new("RGB", (64, 64), "blue"))
    first, second = answer_accuracy(model, processor, [item, other], max_new_tokens=8).records
    assert first.prediction != second.prediction


def test_errors_say_what_is_wrong(vlm):
    model, processor = vlm
    item = VqaItem("q", "a")
    with pytest.raises(ValueError, match="number of items is 0; answering needs at least 1"):
        answer_accuracy(model, processor, [])
    with pytest.raises(ValueError, match="batch_size is 0"):
        answer_accuracy(model, processor, [item], batch_size=0)
    with pytest.raises(ValueError, match="got 0 and 1"):
        text_only_prior([], [item])


def test_bos_is_not_doubled():
    """Template and tokenizer both write one."""
    model, seen = llava(patch=8), []
    model.model.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(inputs["input_ids"]), with_kwargs=True
    )
    answer_accuracy(model, make_llava(), [VqaItem("what color ?", "red", Image.new("RGB", (16, 16)))], max_new_tokens=1)
    assert [row.tolist() for row in seen[0]] == [[1, 7, 99, 99, 99, 99, 9, 10, 14, 4, 8]]
