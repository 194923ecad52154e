"""LLaVA-class models of random weights, with a processor, for benchmarks: no download."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = ["<unk>", "<s>", "</s>", "<image>", "Describe", "the", "picture", ".", "USER:", "ASSISTANT:"]
TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}ASSISTANT:"
)
SHAPES = {
    # the testbed's size, and SmolLM2-135M with a small ViT
    "tiny": {
        "language": {"hidden_size": 192, "num_hidden_layers": 8, "num_attention_heads": 6, "intermediate_size": 768},
        "vision": {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 512},
        "picture": (64, 8),
    },
    "135M": {
        "language": {
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
        },
        "vision": {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768},
        "picture": (112, 14),
    },
}


def build(shape: str) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model in evaluation mode and its processor; 64 visual tokens a picture."""
    size = SHAPES[shape]
    side, patch = size["picture"]
    config = LlavaConfig(
        text_config=LlamaConfig(**size["language"], vocab_size=len(WORDS), pad_token_id=2),
        vision_config=CLIPVisionConfig(**size["vision"], image_size=side, patch_size=patch),
        image_token_index=WORDS.index("<image>"),
    )
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_convert_rgb=True
        ),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return LlavaForConditionalGeneration(config).eval(), processor
