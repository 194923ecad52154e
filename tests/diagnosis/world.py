"""A tiny LLaVA with a real processor, and pictures of two halves whose class is a colour: no download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
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

SIDE, PATCH = 32, 4
TOKENS = (SIDE // PATCH) ** 2
LAYERS, WIDTH = 4, 32
WORDS = ["<unk>", "<s>", "</s>", "<image>", "Describe", "the", "picture", ".", "USER", "ASSISTANT", ":"]
COLOURS = {"blue": (40, 60, 220), "green": (30, 190, 60), "red": (220, 40, 40)}
TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}ASSISTANT:"
)


def tiny_llava(seed: int = 0) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    config = LlavaConfig(
        text_config=LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(WORDS),
            pad_token_id=2,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=PATCH,
            projection_dim=16,
        ),
        image_token_index=WORDS.index("<image>"),
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_convert_rgb=True
    )
    processor = LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return model, processor


def picture(colour: str, seed: int) -> tuple[Image.Image, np.ndarray]:
    """Left half in the class's colour, a grey bar at the right, noise everywhere; mask 1 left, 2 the bar."""
    generator = np.random.default_rng(seed)
    pixels = np.full((SIDE, SIDE, 3), 120.0)
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    pixels[:, : SIDE // 2] = COLOURS[colour]
    mask[:, : SIDE // 2] = 1
    pixels[:, SIDE - 8 :] = 200
    mask[:, SIDE - 8 :] = 2
    pixels += generator.normal(0, 25, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask


def write_world(folder: Path, per_class: int = 8) -> tuple[Path, Path]:
    """An ImageFolder and its masks, subfolders mirrored."""
    for c, colour in enumerate(COLOURS):
        for kind in ("images", "masks"):
            (folder / kind / colour).mkdir(parents=True)
        for i in range(per_class):
            image, mask = picture(colour, 100 * c + i)
            image.save(folder / "images" / colour / f"{i:02d}.png")
            Image.fromarray(mask).save(folder / "masks" / colour / f"{i:02d}.png")
    return folder / "images", folder / "masks"
