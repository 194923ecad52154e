"""LLaVA-class models of random weights, with a processor, for benchmarks: no download."""

from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from keepsight.testbed.tokenizer import load_tokenizer
from keepsight.vlm.assemble import assemble

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
            "vocab_size": 49152,
        },
        "vision": {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768},
        "picture": (112, 14),
    },
}


def build(shape: str) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model in evaluation mode and its processor; 64 visual tokens a picture."""
    size = SHAPES[shape]
    side, patch = size["picture"]
    tokenizer = load_tokenizer()
    language = LlamaConfig(**{"vocab_size": len(tokenizer), **size["language"]}, pad_token_id=tokenizer.pad_token_id)
    vision = CLIPVisionConfig(**size["vision"], image_size=side, patch_size=patch)
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_convert_rgb=True
    )
    return assemble(CLIPVisionModel(vision), LlamaForCausalLM(language), tokenizer=tokenizer, image_processor=pictures)
