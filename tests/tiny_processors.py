"""Tiny real processors of the families in `tests/tiny.py`, built offline: the families' own classes, with a word-level
tokenizer whose tokens can be counted by hand. Its ids are those of the tiny models, so any of these fits its model.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GotOcr2ImageProcessorPil,
    Idefics2ImageProcessorPil,
    Idefics2Processor,
    InternVLProcessor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
)

from tests.tiny import CLOSE, IMAGE, OPEN, TEXT, llava

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "\n", "\n\n", "\n\n\n", "USER:", "ASSISTANT:", "what", "color", "shape"]
WORDS += ["is", "it", "?", "red", "blue", "circle", "hello", "world", "and", "be", "brief", ".", "Describe", "the"]
WORDS += ["picture."]
SMOLVLM = {90: "<fake_token_around_image>", 91: "<global-img>", 92: "<row_1_col_1>", 93: "<row_1_col_2>"}
SMOLVLM |= {94: "<row_2_col_1>", 95: "<row_2_col_2>"}

# One line a turn, pictures where the content has them, an end-of-sequence token after each answer.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}ASSISTANT:{% elif m.role == 'user' %}USER:{% endif %}"
    "{% for c in m.content %} {% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_tokenizer(
    image: str = "<image>", opening: str = "<open>", closing: str = "<close>", **names: str
) -> PreTrainedTokenizerFast:
    """Words, and runs of line breaks that merge into one token as byte-pair tokenizers merge them.

    image, opening, closing: what the family calls its placeholder and the tokens around a picture;
    names: attributes by which the family's processor looks its tokens up.
    """
    special = {**SMOLVLM, 96: "<video>", OPEN: opening, CLOSE: closing, IMAGE: image}
    words = {index: f"<unused {index}>" for index in range(TEXT["vocab_size"])} | dict(enumerate(WORDS)) | special
    core = Tokenizer(models.WordLevel({word: index for index, word in words.items()}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" +"), "removed"),
            pre_tokenizers.Split(Regex("\n+"), "isolated"),
        ]
    )
    # As Llama's: a <bos> in front of any text, which a template that writes its own must not get twice.
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    core.add_special_tokens(list(special.values()))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens={"image_token": image, **names},
    )


def pictures_only(family: type) -> Any:
    """The processor class without its film part, which needs torchvision."""
    kept = [name for name in family.get_attributes() if name != "video_processor"]
    film = SimpleNamespace(num_frames=None, fps=None)
    return type(family.__name__, (family,), {"get_attributes": classmethod(lambda cls: kept), "video_processor": film})


def make_llava(template: str | None = None, side: int = 16, patch: int = 8, **changes) -> LlavaProcessor:
    """CLIP; four tokens a picture unless sizes are given."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_convert_rgb=True
        ),
        tokenizer=make_tokenizer(),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template if template is not None else TEMPLATE.replace("IMAGE", "<image>"),
        **changes,
    )


def save_llava(folder: Path) -> Path:
    """A checkpoint of the tiny LLaVA with four tokens a picture, and its processor."""
    llava(patch=8).save_pretrained(folder)
    make_llava().save_pretrained(folder)
    return folder


def make_llava_siglip() -> LlavaProcessor:
    """SigLIP, which has no CLS token: sixteen tokens a picture, squeezed into a square."""
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": 16, "width": 16}),
        tokenizer=make_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )


def make_qwen() -> Qwen2_5_VLProcessor:
    """As many tokens as the picture's own shape asks for: one for each 8 × 8 pixels."""
    opening, closing, image = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
    return pictures_only(Qwen2_5_VLProcessor)(
        image_processor=Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 4096}
        ),
        tokenizer=make_tokenizer(image, opening, closing, video_token="<video>"),
        chat_template=TEMPLATE.replace("IMAGE", f"{opening}{image}{closing}"),
    )


def make_internvl(max_patches: int = 4) -> InternVLProcessor:
    """Up to `max_patches` tiles of four tokens, and a thumbnail of the whole where there is more than one."""
    return pictures_only(InternVLProcessor)(
        # As in published checkpoints, the image processor by itself would not tile: the processor tells it to.
        image_processor=GotOcr2ImageProcessorPil(
            size={"height": 16, "width": 16}, min_patches=1, max_patches=max_patches
        ),
        tokenizer=make_tokenizer(
            "<IMG_CONTEXT>",
            "<img>",
            "</img>",
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>",
            video_token="<video>",
        ),
        image_seq_length=4,
        chat_template=TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>"),
    )


def make_smolvlm() -> SmolVLMProcessor:
    """Tiles of four tokens, each named in the text, and the whole; pictures up to 32 × 32 pixels."""
    tiles = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}, "do_image_splitting": True}
    # num2words spells out numbers of film frames; the processor does not start without it.
    with mock.patch("transformers.models.smolvlm.processing_smolvlm.num2words", object()):
        return pictures_only(SmolVLMProcessor)(
            image_processor=SmolVLMImageProcessorPil(**tiles),
            tokenizer=make_tokenizer(),
            video_processor=None,
            image_seq_len=4,
            chat_template=TEMPLATE.replace("IMAGE", "<image>"),
        )


def make_gemma(tokens: int = 4) -> Gemma3Processor:
    """Frames every picture with two line breaks on either side, which merge with the text's own."""
    opening, closing, image = "<start_of_image>", "<end_of_image>", "<image_soft_token>"
    return Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": 16, "width": 16}),
        tokenizer=make_tokenizer(image, opening, closing, boi_token=opening, eoi_token=closing),
        image_seq_length=tokens,
        chat_template=TEMPLATE.replace("IMAGE", opening),
    )


def make_idefics2(**changes: Any) -> Idefics2Processor:
    """Four queries of a resampler a picture."""
    size = {"shortest_edge": 16, "longest_edge": 16}
    return Idefics2Processor(
        image_processor=Idefics2ImageProcessorPil(size=size, **{"do_image_splitting": False, **changes}),
        tokenizer=make_tokenizer(image_boundary_token=SMOLVLM[90]),
        image_seq_len=4,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )


def make_llava_next(patch: int = 8) -> LlavaNextProcessor:
    """Several tiles a picture, as many as its shape asks for."""
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": 16},
            crop_size={"height": 16, "width": 16},
            image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
        ),
        tokenizer=make_tokenizer(),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def turns(*contents: list) -> list[dict]:
    """Messages that alternate user and assistant; a string stands for its text part, None for a picture."""
    return [
        {
            "role": ("user", "assistant")[index % 2],
            "content": [{"type": "image"} if part is None else text(part) for part in content],
        }
        for index, content in enumerate(contents)
    ]
