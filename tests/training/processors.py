"""Tiny real processors, built offline: a word-level tokenizer whose tokens can be counted by hand."""

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = ["<unk>", "<pad>", "<bos>", "<eos>", "\n", "\n\n", "\n\n\n", "USER:", "ASSISTANT:", "what", "color", "shape"]
WORDS += ["is", "it", "?", "red", "blue", "circle", "hello", "world", "and", "be", "brief", "."]
ADDED = ["<image>", "<start_of_image>", "<image_soft_token>", "<end_of_image>", "<turn>"]

# One line a turn, pictures where the content has them, an end-of-sequence token after each answer.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}ASSISTANT:{% elif m.role == 'user' %}USER:{% endif %}"
    "{% for c in m.content %} {% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words, and runs of line breaks that merge into one token as byte-pair tokenizers merge them."""
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" +"), "removed"),
            pre_tokenizers.Split(Regex("\n+"), "isolated"),
        ]
    )
    # As Llama's: a <bos> in front of any text, which a template that writes its own must not get twice.
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=ADDED,
    )


def make_llava(template: str | None = None, **changes) -> LlavaProcessor:
    """CLIP at 16 px with patches of 8: four tokens a picture."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_convert_rgb=True
        ),
        tokenizer=make_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template if template is not None else TEMPLATE.replace("IMAGE", "<image>"),
        **changes,
    )


def make_gemma() -> Gemma3Processor:
    """Frames every picture with two line breaks on either side, which merge with the text's own."""
    tokenizer = make_tokenizer()
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    for name, token in names.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    return Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=TEMPLATE.replace("IMAGE", "<start_of_image>"),
    )


def make_llava_next() -> LlavaNextProcessor:
    """Several tiles a picture, as many as its shape asks for."""
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": 16},
            crop_size={"height": 16, "width": 16},
            image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
        ),
        tokenizer=make_tokenizer(),
        patch_size=8,
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
