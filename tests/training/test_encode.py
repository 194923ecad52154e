"""Labels, token by token, and what the encoder refuses."""

import pytest
import torch
from PIL import Image

from keepsight.training.conversations import Conversation, ConversationError
from keepsight.training.encode import CutError, Encoder
from keepsight.training.spans import TemplateError, carry_over, overlapping
from tests.tiny import IMAGE
from tests.tiny_processors import TEMPLATE, make_gemma, make_llava, make_llava_next, turns

RED = Image.new("RGB", (16, 16), "red")
WIDE = Image.new("RGB", (48, 16), "blue")


def conversation(messages, *images) -> Conversation:
    return Conversation("entry 0", messages, tuple((f"picture {i}", image) for i, image in enumerate(images)))


def shown(processor, encoded) -> str:
    """Tokens in order, those with a label in upper case, line breaks as '/'."""
    tokens = processor.tokenizer.convert_ids_to_tokens(encoded.sequence["input_ids"])
    labels = encoded.sequence["labels"].tolist()
    ids = encoded.sequence["input_ids"].tolist()
    assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))
    words = [token if label == -100 else token.upper() for token, label in zip(tokens, labels, strict=True)]
    return " ".join(word.replace("\n", "/") for word in words)


def test_labels_of_two_turns_by_hand(llava) -> None:
    messages = turns([None, "what color is it ?"], ["red"], ["and shape ?"], ["blue circle"])
    encoded = Encoder(llava)(conversation(messages, RED))
    assert shown(llava, encoded) == (
        "<bos> USER: <image> <image> <image> <image> what color is it ? / ASSISTANT: RED <EOS> / "
        "USER: and shape ? / ASSISTANT: BLUE CIRCLE <EOS> /"
    )
    assert encoded.media["pixel_values"].shape == (1, 3, 16, 16)
    assert encoded.sequence["labels"].tolist()[13:15] == [15, 2]  # "red" and the end of turn, counted by hand


def test_text_only_has_no_picture_tensors(llava) -> None:
    encoded = Encoder(llava)(conversation(turns(["hello"], ["hello world"])))
    assert shown(llava, encoded) == "<bos> USER: hello / ASSISTANT: HELLO WORLD <EOS> /"
    assert encoded.media == {}


def test_several_pictures_between_turns(llava) -> None:
    messages = turns([None, None, "shape ?"], ["circle"], ["and", None], ["red"], [None, "?"], ["red"])
    encoded = Encoder(llava)(conversation(messages, RED, RED, RED, RED))
    run = " ".join(["<image>"] * 4)
    assert shown(llava, encoded) == (
        f"<bos> USER: {run} {run} shape ? / ASSISTANT: CIRCLE <EOS> / USER: and {run} / ASSISTANT: RED <EOS> / "
        f"USER: {run} ? / ASSISTANT: RED <EOS> /"
    )
    assert encoded.media["pixel_values"].shape == (4, 3, 16, 16)


def test_frames_that_merge_with_the_text(llava) -> None:
    """Gemma writes two line breaks around a picture; with the turn's own they become one token of three."""
    processor = make_gemma()
    messages = turns(["what", None], ["red"], [None, "\nshape ?"], ["circle"])
    encoded = Encoder(processor)(conversation(messages, RED, RED))
    run = "<start_of_image> " + " ".join(["<image_soft_token>"] * 4) + " <end_of_image>"
    assert shown(processor, encoded) == (
        f"<bos> USER: what // {run} /// ASSISTANT: RED <EOS> / USER: // {run} // / shape ? / ASSISTANT: CIRCLE <EOS> /"
    )
    assert encoded.sequence["token_type_ids"].sum() == 8


def test_unequal_tiles() -> None:
    processor = make_llava_next()
    encoded = Encoder(processor)(conversation(turns([None, None, "?"], ["red"]), RED, WIDE))
    labelled = encoded.sequence["labels"]
    assert labelled[labelled != -100].tolist() == [15, 2]
    assert int((encoded.sequence["input_ids"] == IMAGE).sum()) > 8
    assert encoded.media["image_sizes"].tolist() == [[16, 16], [16, 48]]


def test_spans_agree_with_generation_markers() -> None:
    """Independent check: transformers' own `{% generation %}` mask on a template that has the markers."""
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}USER:"
        "{% for c in m.content %} {% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}"
        "{% else %}ASSISTANT:{% generation %} {{ m.content[0].text }}{{ eos_token }}{% endgeneration %}{% endif %}"
        "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    processor = make_llava(template)
    messages = turns(["what color ?"], ["red"], ["and shape ?"], ["blue circle"])
    encoded = Encoder(processor)(conversation(messages))
    theirs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert (encoded.sequence["labels"] != -100).long().tolist() == theirs["assistant_masks"][0]


def test_bos_is_not_doubled(llava) -> None:
    """The tests' tokenizer writes one by itself, and so does the template; a template without gets the tokenizer's."""
    bare = make_llava(TEMPLATE.replace("IMAGE", "<image>").replace("{{ bos_token }}", ""))
    for processor in (llava, bare):
        encoded = Encoder(processor)(conversation(turns(["hello"], ["world"])))
        assert shown(processor, encoded) == "<bos> USER: hello / ASSISTANT: WORLD <EOS> /"


def test_max_length_cuts_text_and_says_how_much(llava) -> None:
    messages = turns([None, "what ?"], ["red"], ["and ?"], ["blue"])
    whole = Encoder(llava)(conversation(messages, RED))
    short = Encoder(llava, max_length=12)(conversation(messages, RED))
    assert short.cut == whole.sequence["input_ids"].numel() - 12 > 0
    assert torch.equal(short.sequence["input_ids"], whole.sequence["input_ids"][:12])
    assert torch.equal(short.sequence["labels"], whole.sequence["labels"][:12])


def test_max_length_never_cuts_a_picture(llava) -> None:
    late = turns(["what ?"], ["red"], [None, "?"], ["blue"])
    with pytest.raises(CutError, match=r"20 tokens and max_length is 11: 3 image tokens would be cut.*--skip-broken"):
        Encoder(llava, max_length=11)(conversation(late, RED))
    with pytest.raises(CutError, match="no answer would be left"):
        Encoder(llava, max_length=7)(conversation(turns([None, "what ?"], ["red"]), RED))
    with pytest.raises(ValueError, match="max_length is 0; allowed: 1 or more"):
        Encoder(llava, max_length=0)


def test_the_models_own_image_token_in_text() -> None:
    processor = make_gemma()
    with pytest.raises(ConversationError, match=r"image token '<start_of_image>' in its text; use <image>"):
        Encoder(processor)(conversation(turns(["what <start_of_image> ?"], ["red"])))


def test_template_that_is_not_prefix_stable() -> None:
    last_only = TEMPLATE.replace("IMAGE", "<image>").replace(
        "m.role == 'assistant' %}{{ eos_token }}", "loop.last %}{{ eos_token }}"
    )
    encoder = Encoder(make_llava(last_only))
    with pytest.raises(TemplateError, match="not prefix-stable"):
        encoder(conversation(turns(["hello"], ["world"], ["and"], ["red"])))


def test_template_that_ignores_pictures_or_refuses() -> None:
    with pytest.raises(TemplateError, match="writes no image token"):
        Encoder(make_llava(TEMPLATE.replace("IMAGE", "world")))
    refusing = "{% if messages|length > 1 %}{{ raise_exception('one message only') }}{% endif %}"
    encoder = Encoder(make_llava(TEMPLATE.replace("IMAGE", "<image>") + refusing))
    with pytest.raises(TemplateError, match=r"refuses the messages .*one message only.*\['user', 'assistant'\]"):
        encoder(conversation(turns(["hello"], ["world"])))


def test_processor_without_template(llava) -> None:
    llava.chat_template = None
    with pytest.raises(TemplateError, match="has no chat template"):
        Encoder(llava)


def test_carry_over_skips_what_the_picture_brings() -> None:
    """9 is a placeholder; the expansion may hold ordinary ids (5) that also stand in the text."""
    plain = [1, 9, 5, 9, 5, 2, 3, 9, 5, 4]
    labelled = [False] * 5 + [True, True, False, False, True]
    expanded = [1, 5, 8, 8, 5, 5, 8, 8, 5, 5, 2, 3, 5, 8, 8, 5, 5, 4]
    result = carry_over(plain, labelled, frozenset({9}), expanded)
    assert [index for index, value in enumerate(result) if value] == [10, 11, 17]
    with pytest.raises(TemplateError, match="not found after the processor expanded"):
        carry_over(plain, labelled, frozenset({9}), [1, 8, 8, 5, 2, 7])


def test_carry_over_tells_equal_turns_apart() -> None:
    plain, labelled = [1, *[9, 5, 2] * 3], [False, *[False, False, True] * 3]
    expanded = [1, 8, 8, 5, 2, 8, 5, 2, 8, 8, 8, 5, 2]
    result = carry_over(plain, labelled, frozenset({9}), expanded)
    assert [index for index, value in enumerate(result) if value] == [4, 7, 12]


def test_overlapping_leaves_out_tokens_without_characters() -> None:
    assert overlapping([(0, 0), (0, 2), (2, 4), (4, 6), (6, 6)], [(3, 6)]) == [False, False, True, True, False]
