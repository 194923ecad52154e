"""Batches: the same tensors as the family's own processor makes of the whole batch at once."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from keepsight.training.collator import Collator
from keepsight.training.conversations import Conversation
from keepsight.training.encode import Encoded, Encoder
from tests.tiny_processors import make_gemma, make_llava, make_llava_next, turns

RED, WIDE = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (48, 16), "blue")
SAMPLES = [
    (turns([None, None, "what ?"], ["red"]), [RED, WIDE]),
    (turns(["hello"], ["world"]), []),
    (turns(["and", None], ["blue circle"]), [RED]),
]


def conversations() -> list[Conversation]:
    return [Conversation("", messages, tuple(("", image) for image in images)) for messages, images in SAMPLES]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("make", [make_llava, make_llava_next, make_gemma])
def test_equals_the_processor_on_the_whole_batch(make, side: str) -> None:
    processor = make()
    encoder = Encoder(processor)
    batch = Collator(processor, padding_side=side)([encoder(conversation) for conversation in conversations()])
    texts = [processor.apply_chat_template(messages) for messages, _ in SAMPLES]
    whole = [0, 2]  # the processors take no empty list of pictures among others: text-only is compared by itself
    theirs = processor(
        text=[texts[index] for index in whole],
        images=[SAMPLES[index][1] for index in whole],
        return_tensors="pt",
        padding=True,
        padding_side=side,
        add_special_tokens=False,
    )
    length = theirs["input_ids"].shape[1]
    assert set(batch) == {*theirs, "labels"}
    for name, tensor in theirs.items():
        ours = batch[name][whole] if tensor.shape == theirs["input_ids"].shape else batch[name]
        assert torch.equal(ours, tensor), name
    hello = processor.tokenizer(texts[1], add_special_tokens=False).input_ids
    row, mask = batch["input_ids"][1].tolist(), batch["attention_mask"][1].tolist()
    blank, seen = [processor.tokenizer.pad_token_id] * (length - len(hello)), [1] * len(hello)
    assert row == (hello + blank if side == "right" else blank + hello)
    assert mask == (seen + [0] * len(blank) if side == "right" else [0] * len(blank) + seen)
    assert bool((batch["labels"][batch["attention_mask"] == 0] == -100).all())


def test_image_free_batch_and_token_types_given_with_pictures_only(llava) -> None:
    encoder, collator = Encoder(llava), Collator(llava)
    free = encoder(conversations()[1])
    assert set(collator([free, free])) == {"input_ids", "attention_mask", "labels"}
    typed = replace(free, sequence={**free.sequence, "mm_token_type_ids": torch.ones(8, dtype=torch.long)})
    batch = collator([typed, free])
    assert batch["mm_token_type_ids"].sum(dim=1).tolist() == [8, 0]


def test_unequal_picture_sizes_are_filled_with_zeros(llava) -> None:
    ids = {"input_ids": torch.tensor([1]), "labels": torch.tensor([1])}
    small, large = torch.ones(1, 2, 3), torch.full((2, 4, 1), 2.0)
    batch = Collator(llava)([Encoded(ids, {"pixel_values": small}), Encoded(ids, {"pixel_values": large})])
    pixels = batch["pixel_values"]
    assert pixels.shape == (3, 4, 3)
    assert pixels[0, :2].eq(1).all()
    assert pixels[0, 2:].eq(0).all()
    assert pixels[1:, :, 0].eq(2).all()
    assert pixels[1:, :, 1:].eq(0).all()


def test_refuses_a_side_or_a_padding_token_that_cannot_be(llava) -> None:
    with pytest.raises(ValueError, match="padding_side is 'both'; allowed: 'right', 'left'"):
        Collator(llava, padding_side="both")
    llava.tokenizer.pad_token = "<image>"
    with pytest.raises(ValueError, match=r"padding token '<image>' \(id 99\) is the image token"):
        Collator(llava)
