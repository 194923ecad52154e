import re
from collections import Counter

from keepsight.testbed import scenes as world
from keepsight.testbed.language import CAPTION_REQUEST, QUESTION_TYPES, caption, questions, words
from keepsight.testbed.scenes import Scene, SceneObject, draw_scene, draw_scenes
from keepsight.testbed.tokenizer import load_tokenizer

SCENES = draw_scenes(21, 400)


def answer_from_picture_truth(scene: Scene, question: str) -> str:
    """Answers again from coordinates and lists, with a parser of its own."""
    objects = [
        {"shape": o.shape, "color": o.color, "size": o.size, "left": o.x < 32, "top": o.y < 32, "x": o.x}
        for o in scene.objects
    ]

    def only(**wanted):
        found = [o for o in objects if all(o[k] == v for k, v in wanted.items())]
        assert len(found) == 1, (question, scene)
        return found[0]

    def place(text):
        return {"top": text.startswith("top"), "left": text.endswith("left")}

    if m := re.fullmatch(r"what color is the (top|bottom) (left|right) object \?", question):
        return only(**place(f"{m[1]} {m[2]}"))["color"]
    if m := re.fullmatch(r"what color is the (\w+) \?", question):
        return only(shape=m[1])["color"]
    if m := re.fullmatch(r"what is the ((?:top|bottom) \w+) object \?", question):
        return only(**place(m[1]))["shape"]
    if m := re.fullmatch(r"what is the (\w+) object \?", question):
        return only(color=m[1])["shape"]
    if m := re.fullmatch(r"where is the (\w+)( object)? \?", question):
        o = only(color=m[1]) if m[2] else only(shape=m[1])
        return f"{'top' if o['top'] else 'bottom'} {'left' if o['left'] else 'right'}"
    if m := re.fullmatch(r"what size is the (\w+) \?", question):
        return only(shape=m[1])["size"]
    if question == "how many objects are there ?":
        return world.NUMBERS[len(objects)]
    if m := re.fullmatch(r"how many (\w+) objects \?", question):
        return world.NUMBERS[sum(o["color"] == m[1] for o in objects)]
    if m := re.fullmatch(r"how many (\w+) \?", question):
        singular = "cross" if m[1] == "crosses" else m[1].removesuffix("s")
        return world.NUMBERS[sum(o["shape"] == singular for o in objects)]
    if m := re.fullmatch(r"is there a (\w+) (\w+) \?", question):
        return "yes" if any(o["color"] == m[1] and o["shape"] == m[2] for o in objects) else "no"
    if m := re.fullmatch(r"is the (\w+) left of the (\w+) \?", question):
        a, b = only(shape=m[1]), only(shape=m[2])
        assert a["left"] != b["left"]
        return "yes" if a["x"] < b["x"] else "no"
    if m := re.fullmatch(r"(\w+) and (\w+) : same or different color \?", question):
        return "same" if only(shape=m[1])["color"] == only(shape=m[2])["color"] else "different"
    raise AssertionError(f"no rule for {question!r}")


def test_every_answer_is_right():
    kinds = Counter()
    for scene in SCENES:
        for turn in questions(scene, 8):
            assert turn.answer == answer_from_picture_truth(scene, turn.question)
            kinds[turn.kind] += 1
    assert set(kinds) == set(QUESTION_TYPES)
    assert min(kinds.values()) > 60


def test_guessing_yes_or_counting_zero_does_not_pay():
    answers = {kind: Counter() for kind in QUESTION_TYPES}
    for scene in SCENES:
        for turn in questions(scene, 8):
            answers[turn.kind][turn.answer] += 1
    for kind, highest in (("color", 0.25), ("shape", 0.25), ("where", 0.35), ("how many", 0.5)):
        assert max(answers[kind].values()) / answers[kind].total() < highest, kind
    for kind in ("is there", "left of", "size"):
        assert 0.4 < max(answers[kind].values()) / answers[kind].total() < 0.6, kind
    assert max(answers["same or different"].values()) / answers["same or different"].total() < 0.75


def test_caption_by_hand():
    objects = (
        SceneObject("ring", "red", "small", "top right", 48.0, 16.0, 9.0),
        SceneObject("cross", "cyan", "large", "bottom left", 16.0, 48.0, 14.0),
    )
    scene = Scene(**{**draw_scene(0, 0).__dict__, "objects": objects})
    assert caption(scene) == (
        "nothing at all top left , small red ring top right , large cyan cross bottom left , "
        "nothing at all bottom right ."
    )


def test_captions_say_everything_and_are_equally_long():
    for scene in SCENES:
        parts = caption(scene).removesuffix(" .").split(" , ")
        expected = []
        for place in world.PLACES:
            found = [o for o in scene.objects if o.place == place]
            expected.append(
                f"{found[0].size} {found[0].color} {found[0].shape} {place}" if found else f"nothing at all {place}"
            )
        assert parts == expected
        assert len(caption(scene).split()) == 24


def test_no_sentence_speaks_of_the_background():
    vocabulary = set(words())
    for names in (world.TEXTURES, world.ORIENTATIONS, world.LIGHTINGS, world.TINTS, world.UNASKED):
        for name in names:
            assert not vocabulary & set(name.lower().split()), name
    # Nor indirectly: with another background every sentence stays the same.
    for scene in SCENES[:50]:
        other = Scene(
            **{
                **scene.__dict__,
                "texture": "grain",
                "orientation": "15 degrees",
                "contrast": 9.0,
                "lighting": "from 60 degrees",
                "tint": "hue 300",
                "brightness": 99.0,
                "period": 7.0,
            }
        )
        assert caption(other) == caption(scene)
        assert questions(other, 8) == questions(scene, 8)


def test_questions_differ_and_are_as_many_as_asked_for():
    for scene in SCENES:
        asked = [turn.question for turn in questions(scene, 8)]
        assert len(set(asked)) == len(asked) == 8
    assert questions(SCENES[0], 6, salt=1) != questions(SCENES[0], 6)


def test_tokenizer_knows_every_word_and_gives_it_back():
    tokenizer = load_tokenizer()
    for scene in SCENES:
        texts = [caption(scene), CAPTION_REQUEST]
        texts += [text for turn in questions(scene, 8) for text in (turn.question, turn.answer)]
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids, text
            assert tokenizer.decode(ids) == text
    assert tokenizer.tokenize("What color is the CIRCLE?") == ["what", "color", "is", "the", "circle", "?"]
    assert tokenizer.tokenize("<image>\n<|user|> no</s>") == ["<image>", "<|user|>", "no", "</s>"]
