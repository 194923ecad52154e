import pytest
import torch
from PIL import Image
from scipy.stats import norm

from keepsight.evaluation import Question, evaluate, keep, text_only_prior
from keepsight.evaluation.questions import PictureFile
from keepsight.evaluation.scoring import interval, normalise
from keepsight.results import RunDirectory
from keepsight.testbed import models
from keepsight.testbed.folders import vqa_items
from keepsight.testbed.scenes import draw_scenes
from keepsight.vlm.pruning import Pruning
from tests.tiny import llava, qwen2_5_vl
from tests.tiny_processors import make_llava, make_qwen


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
    assert normalise("1,000 men") == "1000 men"
    assert normalise("1, 2") == normalise("1,2") == "1 2"
    assert normalise("-5 °C") == normalise("\u22125 C") == "minus 5 c"
    assert normalise("3-5") == "3 5"
    assert normalise("A.") == normalise("a") == "a"
    assert normalise("+") == "+"
    assert normalise("") == ""
    assert normalise("re\u0301d") == normalise("r\u00e9d") != normalise("red")
    assert normalise("\u0915\u093f") != normalise("\u0915\u093e")  # Hindi ki and ka: only the vowel sign differs


def test_prior_by_hand():
    train = [
        Question("what color is it ?", "red", kind="color"),
        Question("what color is it ?", "blue", kind="color"),
        Question("What color  is it ?", "blue", kind="color"),
        Question("what color is that ?", "red", kind="color"),
        Question("what color is that ?", "red", kind="color"),
        Question("how many ?", "two", kind="how many"),
    ]
    test = [
        Question("what color is it ?", "blue", kind="color"),  # exact question: blue 2 of 3 → right
        Question("what color is that ?", "blue", kind="color"),  # exact question: red → wrong
        Question("which color ?", "red", kind="color"),  # by type: red 3 of 5 → right
        Question("anything ?", "red", kind="new"),  # of all: red 3 of 6 → right
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
    train = [Question("q", "no"), Question("q", "yes"), Question("q", "yes"), Question("q", "no")]
    assert text_only_prior(train, [Question("q", "yes")]).records[0].prediction == "no"


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
    items += [Question("how many ?", "two"), Question("what color is the large red ring in the picture ?", "red")]
    batched = evaluate(model, processor, items, batch_size=6, max_new_tokens=4)
    single = evaluate(model, processor, items, batch_size=1, max_new_tokens=4)
    assert [r.prediction for r in batched.records] == [r.prediction for r in single.records]
    assert len({r.prediction for r in single.records}) > 3  # answers that differ, else equality says nothing
    assert [r.question for r in batched.records] == items
    assert batched.rows == single.rows


@pytest.mark.slow
def test_right_padding_would_have_been_noticed(vlm, monkeypatch):
    model, processor = vlm
    items = vqa_items(draw_scenes(5, 3), turns=5)
    single = evaluate(model, processor, items, batch_size=1, max_new_tokens=4)
    original = type(processor).__call__
    monkeypatch.setattr(
        type(processor), "__call__", lambda self, **given: original(self, **{**given, "padding_side": "right"})
    )
    wrong = evaluate(model, processor, items, batch_size=6, max_new_tokens=4)
    assert [r.prediction for r in wrong.records] != [r.prediction for r in single.records]


def test_scores_exact_matches_and_leaves_the_mode(vlm, tmp_path):
    model, processor = vlm
    records = evaluate(model, processor, vqa_items(draw_scenes(6, 3), turns=2), max_new_tokens=3).records
    item, said = next((r.question, r.prediction) for r in records if normalise(r.prediction))
    item.image.save(tmp_path / "a.png")
    right = Question(item.question, f"{said}.", image=tmp_path / "a.png", kind="x", picture="a")
    wrong = Question(item.question, f"{said} extra", image=str(tmp_path / "a.png"), kind="y", picture="a")
    model.train()
    model.model.vision_tower.eval()  # as when it is frozen
    result = evaluate(model, processor, [right, wrong], max_new_tokens=3)
    assert model.training
    assert not model.model.vision_tower.training
    model.eval()
    assert {row.target: row.value for row in result.rows} == {"": 0.5, "x": 1.0, "y": 0.0}
    assert {row.unit for row in result.rows} == {"questions"}
    assert {row.metric for row in result.rows} == {"answer_accuracy"}


def test_the_picture_matters(vlm):
    model, processor = vlm
    item = Question("what is the top left object ?", "ring", image=Image.new("RGB", (64, 64), "red"))
    other = Question(item.question, "ring", image=Image.new("RGB", (64, 64), "blue"))
    first, second = evaluate(model, processor, [item, other], max_new_tokens=8).records
    assert first.prediction != second.prediction


def test_errors_say_what_is_wrong(vlm):
    model, processor = vlm
    item = Question("q", "a")
    with pytest.raises(ValueError, match="number of questions is 0; answering needs at least 1"):
        evaluate(model, processor, [])
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluate(model, processor, [item], batch_size=0)
    with pytest.raises(ValueError, match="got 0 and 1"):
        text_only_prior([], [item])


def test_bos_is_not_doubled():
    """Template and tokenizer both write one."""
    model, seen = llava(patch=8), []
    model.model.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(inputs["input_ids"]), with_kwargs=True
    )
    evaluate(model, make_llava(), [Question("what color ?", "red", Image.new("RGB", (16, 16)))], max_new_tokens=1)
    assert [row.tolist() for row in seen[0]] == [[1, 7, 99, 99, 99, 99, 9, 10, 14, 4, 8]]


def test_choices_are_listed_or_tried(vlm):
    """The likeliest choice is the one with the highest mean log-probability, computed here without a batch."""
    model, processor = vlm
    image = Image.new("RGB", (64, 64), "red")
    choices = ("red", "a large blue ring", "blue", "top left")
    question = Question("what color is it ?", "red", image=image, choices=choices)
    (said,) = evaluate(model, processor, [question], choices="likelihood").records
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.question}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    start = processor(text=prompt, images=image, return_tensors="pt")["input_ids"].shape[1]
    means = []
    for choice in choices:
        batch = processor(text=prompt + choice, images=image, return_tensors="pt")
        with torch.no_grad():
            logp = model(**batch).logits[0].log_softmax(-1)
        ids = batch["input_ids"][0]
        means.append(float(logp[torch.arange(start - 1, len(ids) - 1), ids[start:]].mean()))
    assert said.prediction == choices[int(torch.tensor(means).argmax())]
    assert sorted(means)[-1] - sorted(means)[-2] > 1e-3

    prompts = []
    original = type(processor).__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(processor), "__call__", lambda self, **g: prompts.extend(g["text"]) or original(self, **g))
        evaluate(model, processor, [question], max_new_tokens=1)
    assert (
        "what color is it ?\nA. red\nB. a large blue ring\nC. blue\nD. top left\nAnswer with the option's letter"
        in prompts[0]
    )


def test_pictures_stand_where_they_are_marked(vlm):
    model, processor = vlm
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    questions = [
        Question("is <image> like <image> ?", "no", image=[red, blue]),
        Question("is <image> like <image> ?", "no", image=[blue, red]),
        Question("what color ?", "red", image=red),
        Question("how many ?", "two"),
    ]
    batched = evaluate(model, processor, questions, batch_size=4, max_new_tokens=4)
    single = evaluate(model, processor, questions, batch_size=1, max_new_tokens=4)
    assert [r.prediction for r in batched.records] == [r.prediction for r in single.records]
    assert [r.question for r in batched.records] == questions


def test_what_goes_wrong_costs_its_question_only(vlm, tmp_path):
    model, processor = vlm
    (tmp_path / "broken.png").write_bytes(b"no picture")
    limit = model.config.get_text_config().max_position_embeddings
    questions = [
        Question("what color ?", "red", image=Image.new("RGB", (64, 64))),
        Question("what color ?", "red", image=tmp_path / "broken.png"),
        Question("what color ?", "red", image=lambda: tmp_path / "missing.png"),
        Question("red " * 2500, "red", image=Image.new("RGB", (64, 64))),  # 10,000 characters
        Question("red " * (limit + 10), "red", choices=("red", "blue")),
        Question("what color ?", "", id="empty"),
        Question("what color ?", "1", choices=[str(number) for number in range(28)]),
        Question("what color ?", [], id="none"),
        Question("what color ?", "red", choices=("<image>", "red"), id="mark"),
        Question("what color ?", "red", image=PictureFile("A" * 5000, tmp_path), id="base64"),
        Question("what color ?", "red", image=5, id="number"),
    ]
    result = evaluate(model, processor, questions, max_new_tokens=1)
    assert len(result.records) == 1
    assert "broken.png' cannot be read" in result.left_out[1]
    assert "missing.png" in result.left_out[2]
    for position in (3, 4):
        assert result.left_out[position].endswith(f"tokens with its pictures; the model's context is {limit}")
    assert result.left_out[5] == "the right answer is empty"
    assert result.left_out[6] == "it has 28 choices, and letters for 26; ask by likelihood (choices)"
    assert result.left_out[7] == "the right answer is empty"
    assert result.left_out[8] == "it has 1 <image> and 0 pictures; as many are needed"
    assert "File name too long" in result.left_out[9]
    assert len(result.left_out[9]) < 600
    assert "its picture cannot be read (AttributeError: 'int' object" in result.left_out[10]
    assert result.counts["questions left out"] == 10
    run = RunDirectory.create(tmp_path / "run", label="x", kind="evaluation")
    keep(run, {"one": questions}, {"one": result})
    assert [record.left_out == "" for record in run.read_answers()] == [True] + [False] * 10
    assert result.counts["answers cut off by max_new_tokens"] == 1
    with pytest.raises(ValueError, match="none of the 1 questions can be asked; the first: the right answer is empty"):
        evaluate(model, processor, questions[5:6])


def test_a_picture_that_the_processor_refuses_costs_its_question_only():
    """Qwen's refuses what is more than 200 times as wide as high."""
    model, processor = qwen2_5_vl()[0], make_qwen()
    fine = [Question("what color ?", "red", Image.new("RGB", (16, 16), colour)) for colour in ("red", "blue")]
    narrow = Image.new("RGB", (3000, 8))
    wrong = [Question("what ?", "red", narrow), Question("what ?", "red", narrow, choices=("red", "blue"))]
    alone = evaluate(model, processor, fine, max_new_tokens=2, batch_size=1)
    for choices in ("generation", "likelihood"):
        result = evaluate(model, processor, [fine[0], *wrong, fine[1]], max_new_tokens=2, choices=choices)
        assert [r.prediction for r in result.records] == [r.prediction for r in alone.records]
        assert list(result.left_out) == [1, 2]
        assert "processor does not take it (ValueError: absolute aspect ratio must be" in result.left_out[2]


def test_choices_may_be_pictures(vlm):
    model, processor = vlm
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    question = Question("which one is red ?", "A", [red, blue], choices=("<image>", "<image> "))
    assert len(evaluate(model, processor, [question], max_new_tokens=1).records) == 1
    with pytest.raises(ValueError, match="pictures as choices are asked by generation only"):
        evaluate(model, processor, [question], max_new_tokens=1, choices="likelihood")


def test_no_room_for_the_answer_is_not_a_long_question(vlm):
    model, processor = vlm
    with pytest.raises(ValueError, match=r"it has \d+ tokens with its pictures, with 9000 more for the answer"):
        evaluate(model, processor, [Question("what color ?", "red")], max_new_tokens=9000)


def test_an_end_is_no_cut_and_an_empty_answer_is_counted(vlm, monkeypatch):
    model, processor = vlm
    end = model.generation_config.eos_token_id
    monkeypatch.setattr(
        model, "generate", lambda input_ids, **_: torch.cat([input_ids, torch.full((len(input_ids), 1), end)], dim=1)
    )
    result = evaluate(model, processor, [Question("what color ?", "red")])
    assert (result.records[0].prediction, result.records[0].cut, result.records[0].score) == ("", False, 0.0)
    assert result.counts == {"questions": 1, "empty answers": 1}


def test_stopped_and_gone_on(vlm, tmp_path, monkeypatch):
    model, processor = vlm
    questions = vqa_items(draw_scenes(5, 3), turns=4)
    whole = evaluate(model, processor, questions, batch_size=5, max_new_tokens=4)

    seen = []

    def stop(count: int) -> None:
        seen.append(count)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, processor, questions, batch_size=5, max_new_tokens=4, journal=tmp_path / "j", done=stop)
    file = tmp_path / "j" / "answers-0.jsonl"
    assert len(file.read_text().splitlines()) == 10
    with file.open("a") as handle:
        handle.write('{"id": "11", "question": "cut o')  # killed while writing
    asked = []
    again = evaluate(
        model, processor, questions, batch_size=5, max_new_tokens=4, journal=tmp_path / "j", done=asked.append
    )
    assert sum(asked) == len(questions) - 10
    assert [r.prediction for r in again.records] == [r.prediction for r in whole.records]
    assert again.rows == whole.rows
    assert all(line.endswith("}") for line in file.read_text().splitlines())
    with pytest.raises(ValueError, match="is not among the questions asked now, or has another text"):
        evaluate(model, processor, [Question("other ?", "a")], journal=tmp_path / "j")
    listed = [Question("q ?", "a", choices=("a", "b"))]
    evaluate(model, processor, listed, max_new_tokens=1, journal=tmp_path / "c")
    with pytest.raises(ValueError, match="another text or other choices"):  # "A" would be another answer
        evaluate(model, processor, [Question("q ?", "a", choices=("b", "a"))], journal=tmp_path / "c")


@pytest.mark.slow
def test_pruned_tokens_change_the_answers_of_single_and_batched_alike(vlm):
    model, processor = vlm
    questions = vqa_items(draw_scenes(5, 3), turns=4)
    whole = evaluate(model, processor, questions, batch_size=5, max_new_tokens=4)
    for pruning in (Pruning(2, 0.1), Pruning(0, 0.0, "uniform")):
        batched = evaluate(model, processor, questions, batch_size=5, max_new_tokens=4, pruning=pruning)
        single = evaluate(model, processor, questions, batch_size=1, max_new_tokens=4, pruning=pruning)
        assert [r.prediction for r in batched.records] == [r.prediction for r in single.records]
        assert [r.prediction for r in batched.records] != [r.prediction for r in whole.records]
    blind = {(r.question.question, r.prediction) for r in single.records}
    assert len(blind) == len({question for question, _ in blind}), "without any token the question decides alone"
