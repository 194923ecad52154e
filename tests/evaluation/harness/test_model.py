"""The model that lmms-eval asks: answers equal those of our own questions, whatever a batch holds."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lmms_eval.evaluator", reason="needs lmms-eval: make test-harness", exc_type=ImportError)

from keepsight.evaluation import Question, evaluate
from keepsight.evaluation.harness import manifest, missing
from keepsight.evaluation.harness.model import Chat, Simple, UnsupportedError
from keepsight.evaluation.harness.tasks import known_tasks, run_task
from keepsight.vlm.pruning import Pruning
from tests.evaluation.harness.benchmarks import picture
from tests.tiny import llava
from tests.tiny_processors import make_llava, save_llava

TEXTS = ["what color ?", "what color ? what color ?", "red", "what ? red color", "color"]
DOCS = [
    {"text": text, "pictures": [picture(i) for i in range(n)]} for text, n in zip(TEXTS, (1, 1, 2, 0, 1), strict=True)
]


def visuals(doc):
    return doc["pictures"]


def messages(doc):
    content = [{"type": "image", "url": one} for one in visuals(doc)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": doc["text"]}]}]


def request(number, lm, **settings):
    settings = {"max_new_tokens": 3} | settings
    how = (settings, visuals) if lm.is_simple else (messages, settings)
    return SimpleNamespace(args=(DOCS[number]["text"], *how, number, "task", "test"))


@pytest.fixture(scope="module")
def tiny():
    model = llava(patch=8)
    with torch.no_grad():  # sharper logits: answers of an untrained model must not hang on rounding
        model.lm_head.weight.mul_(20)
    return model, make_llava()


def made(kind, tiny, batch_size=4, **settings):
    lm = kind.around(*tiny, batch_size=batch_size, **settings)
    lm.task_dict = {"task": {"test": DOCS}}
    return lm


@pytest.mark.parametrize("pruning", [None, Pruning(1, 0.5)])
def test_answers_are_those_of_our_own_questions(tiny, pruning):
    own = evaluate(
        *tiny,
        [Question(doc["text"], "red", doc["pictures"] or None, id=str(i)) for i, doc in enumerate(DOCS)],
        batch_size=1, max_new_tokens=3, pruning=pruning,
    )  # fmt: skip
    wanted = [record.prediction for record in own.records]
    assert len(set(wanted)) > 1
    for kind in (Chat, Simple):
        for size in (1, 4):
            lm = made(kind, tiny, size, pruning=pruning)
            assert lm.generate_until([request(i, lm) for i in range(len(DOCS))]) == wanted


def test_every_request_has_its_own_length_and_stops(tiny):
    lm = made(Simple, tiny)
    [whole] = lm.generate_until([request(0, lm, max_new_tokens=6)])
    words = whole.split()
    assert len(words) >= 2
    said = lm.generate_until(
        [
            request(0, lm, max_new_tokens=6),
            request(0, lm, max_new_tokens=1),
            request(0, lm, max_new_tokens=6, until=[words[1]]),
        ]
    )
    assert said[0] == whole
    assert len(said[1]) < len(whole)
    assert said[2] == whole[: whole.find(words[1])]


def test_likelihoods_are_losses_by_the_definition(tiny):
    model, processor = tiny
    lm = made(Simple, tiny, 2)
    choices = ["red", "what color", "color ?"]
    requests = [SimpleNamespace(args=(DOCS[0]["text"], f" {choice}", visuals, 0, "task", "test")) for choice in choices]
    found = lm.loglikelihood(requests)
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": DOCS[0]["text"]}]}],
        add_generation_prompt=True,
    )
    for pair, choice in zip(found, choices, strict=True):
        loss, greedy = pair.text
        batch = processor(
            text=prompt + choice, images=visuals(DOCS[0]), add_special_tokens=False, return_tensors="pt"
        )  # fmt: skip
        ids = batch["input_ids"][0]
        own = len(choice.split())  # words are tokens; the first joins the prompt's last word, to which it is glued
        logits = model(**batch).logits[0, -own - 1 : -1]
        assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, ids[-own:]).item(), abs=1e-4)
        assert greedy == bool((logits.argmax(-1) == ids[-own:]).all())


def test_what_is_not_answered_is_named(tiny):
    lm = made(Chat, tiny)
    film = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}, {"type": "text", "text": "?"}]}]
    with pytest.raises(UnsupportedError, match=r"task: it shows the model video; .* pictures only"):
        lm.generate_until([SimpleNamespace(args=("?", lambda doc: film, {}, 0, "task", "test"))])
    plain = made(Simple, tiny)
    with pytest.raises(UnsupportedError, match=r"task: it shows the model 'a.mp4'"):
        plain.generate_until([SimpleNamespace(args=("?", {}, lambda doc: ["a.mp4"], 0, "task", "test"))])
    with pytest.raises(UnsupportedError, match="task: tasks of several rounds are not asked"):
        lm.generate_until_multi_round([request(0, lm)])
    with pytest.raises(ValueError, match="batch_size is 'auto'; allowed: a number of questions, 1 or more"):
        made(Chat, tiny, "auto")


def test_a_question_that_cannot_be_asked_costs_itself_only(tiny):
    lm = made(Chat, tiny)
    long = [{"role": "user", "content": [{"type": "text", "text": "red " * 10_000}]}]
    broken = SimpleNamespace(args=("?", lambda doc: long, {"max_new_tokens": 3}, 7, "task", "test"))
    lm.task_dict["task"]["test"] = [*DOCS, None, None, None]
    wanted = lm.generate_until([request(0, lm), request(3, lm)])
    assert lm.generate_until([request(0, lm), broken, request(3, lm)]) == [wanted[0], "", wanted[1]]
    assert list(lm.refused) == ["task-7"]
    assert "the model's context is" in lm.refused["task-7"]


def test_what_was_answered_is_not_asked_again(tiny, tmp_path, monkeypatch):
    lm = made(Chat, tiny)
    lm.journal = tmp_path
    first = lm.generate_until([request(i, lm) for i in (0, 1)])
    asked = []
    again = made(Chat, tiny)
    again.journal = tmp_path
    monkeypatch.setattr(again, "_question", lambda r: asked.append(r.args[3]) or Chat._question(again, r))
    assert again.generate_until([request(i, again) for i in (0, 1, 2)])[:2] == first
    assert asked == [2]


def test_lmms_eval_finds_the_model(tmp_path):
    assert missing() == ""
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.get_model_class("keepsight") is Chat
    assert registry.get_model_class("keepsight", force_simple=True) is Simple


@pytest.mark.slow
def test_made_as_lmms_eval_makes_it_with_an_adapter_and_pruning(tmp_path):
    import peft
    from transformers import AutoModelForImageTextToText

    base = save_llava(tmp_path / "base")
    model = AutoModelForImageTextToText.from_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    settings = f"pretrained={base},adapter={tmp_path / 'adapter'},prune_keep=0.5,prune_layer=1,prune_by=uniform"
    lm = Chat.create_from_arg_string(settings, {"batch_size": 2, "device": "cpu"})
    assert (lm.pruning, lm.batch_size) == (Pruning(1, 0.5, "uniform"), 2)
    # The adapter alone names the model that it stands on.
    alone = Chat.create_from_arg_string(f"pretrained={tmp_path / 'adapter'}", {"batch_size": 1, "device": "cpu"})
    wanted = adapted.merge_and_unload().state_dict()
    for found in (lm, alone):
        state = found.vlm.model.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())


@pytest.mark.slow
def test_a_multiple_choice_task_takes_the_likeliest_choice(tiny, tmp_path):
    rows = [{"q": "what color ?", "choices": ["red", "what"], "gold": gold} for gold in (0, 1)]
    rows.append({"q": "red", "choices": ["red", "what " * 300], "gold": 0})  # its second choice is too long to be asked
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path / 'rows.json'}\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\ndoc_to_target: gold\ndoc_to_choice: choices\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    lm = Simple.around(*tiny, batch_size=1)
    [found] = run_task(lm, "mine", known_tasks(str(tmp_path)), tmp_path)
    own = evaluate(
        *tiny,
        [Question("what color ?", "red", choices=("red", "what"), id="0")],
        choices="likelihood",
        max_new_tokens=1,
    )
    likeliest = ["red", "what"].index(own.records[0].prediction)
    assert [one.score for one in found.answered] == [float(likeliest == gold) for gold in (0, 1)] + [0.0]
    assert [one.prediction for one in found.answered] == [["red", "what"][likeliest]] * 2 + [""]
    assert [one.target for one in found.answered] == [["red"], ["what"], ["red"]]
    assert found.numbers["acc"][0] == pytest.approx(1 / 3)
    assert list(lm.refused) == ["mine-2"]
    assert "the model's context is 256" in lm.refused["mine-2"]
