"""LLaVA-class models of random weights, with a processor, for benchmarks: no download."""

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
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
    # LLaVA-1.5-7B, and the same with two narrow layers, by which tests see that its path works
    "7B": {
        "language": {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "intermediate_size": 11008,
            "vocab_size": 32064,
        },
        "vision": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        "picture": (336, 14),
    },
    "7B-narrow": {
        "language": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "vocab_size": 64,
        },
        "vision": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
        "picture": (56, 14),
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


def build_on(shape: str, device: str, *, layers: int | None = None) -> LlavaForConditionalGeneration:
    """The model alone, in bf16, its weights drawn on the device; `layers`: of the decoder, instead of the shape's."""
    size = SHAPES[shape]
    side, patch = size["picture"]
    language = {**size["language"], **({"num_hidden_layers": layers} if layers else {})}
    config = LlavaConfig(
        text_config=LlamaConfig(**language),
        vision_config=CLIPVisionConfig(**size["vision"], image_size=side, patch_size=patch),
        image_token_index=language["vocab_size"] - 1,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    with torch.device(device):
        return LlavaForConditionalGeneration(config).to(torch.bfloat16)
