"""Tiny random models of the supported families, with batches made by hand: no tokenizer, no download.

Every family is a function `(seed) -> (model, batch)`; a batch holds two samples of which the first has two pictures and
the second one (three in all), with text around and between them and padding on the right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    SiglipVisionConfig,
    SmolVLMConfig,
)

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
IMAGE = 99  # the placeholder's id
OPEN, CLOSE = 97, 98  # what stands around pictures in families that mark them


def build(config: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    return AutoModelForImageTextToText.from_config(config).eval()


def sequences(*rows: list[int]) -> dict[str, torch.Tensor]:
    """Right-padded ids and attention mask."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def pixels(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def llava(side: int = 16, patch: int = 4, seed: int = 0) -> Any:
    """CLIP with a CLS token, and Llama; pictures of `side` × `side` pixels, a token for each `patch` × `patch`."""
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**{**VISION, "image_size": side, "patch_size": patch}, projection_dim=32),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return build(config, seed)


def llava_clip_llama(seed: int = 0) -> tuple[Any, dict[str, Any]]:
    one = [IMAGE] * 16
    batch = sequences([1, 5, *one, *one, 6, 7, 8], [1, *one, 9, 10])  # the first two pictures are adjacent
    return llava(seed=seed), {**batch, "pixel_values": pixels(3, 3, 16, 16, seed=seed)}


def llava_siglip_qwen2(seed: int = 0) -> tuple[Any, dict[str, Any]]:
    config = LlavaConfig(
        text_config=Qwen2Config(**TEXT),
        vision_config=SiglipVisionConfig(**VISION),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    one = [IMAGE] * 16
    batch = sequences([1, *one, 5, *one, 6, 7, 8], [1, *one, 9, 10])
    return build(config, seed), {**batch, "pixel_values": pixels(3, 3, 16, 16, seed=seed)}


def qwen2_5_vl(seed: int = 0) -> tuple[Any, dict[str, Any]]:
    config = Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": 32,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE,
        video_token_id=96,
        vision_start_token_id=OPEN,
        vision_end_token_id=CLOSE,
    )
    grids = [(1, 4, 4), (1, 4, 6), (1, 2, 8)]  # patches; unequal: 4, 6 and 4 tokens
    spans = [[OPEN, *[IMAGE] * (h * w // 4), CLOSE] for _, h, w in grids]
    batch = sequences([1, *spans[0], *spans[1], 6, 7, 8], [1, *spans[2], 9, 10])
    patches = sum(h * w for _, h, w in grids)
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).int()
    return build(config, seed), {
        **batch,
        "pixel_values": pixels(patches, 3 * 2 * 4 * 4, seed=seed),
        "image_grid_thw": torch.tensor(grids),
    }


def internvl(seed: int = 0) -> tuple[Any, dict[str, Any]]:
    config = InternVLConfig(
        text_config=Qwen2Config(**TEXT),
        vision_config={**VISION, "image_size": [16, 16], "patch_size": [4, 4]},
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    tiled, single = (
        [OPEN, *[IMAGE] * 12, CLOSE],
        [OPEN, *[IMAGE] * 4, CLOSE],
    )  # three tiles (two and a thumbnail), one tile
    batch = sequences([1, *tiled, *single, 6, 7, 8], [1, *single, 9, 10])
    return build(config, seed), {**batch, "pixel_values": pixels(5, 3, 16, 16, seed=seed)}


def gemma(patch: int = 4, tokens: int = 4, seed: int = 0) -> Any:
    """SigLIP, whose patches are averaged to `tokens` a picture, and Gemma 3."""
    config = Gemma3Config(
        text_config={**TEXT, "head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8},
        vision_config={**VISION, "patch_size": patch, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=tokens,
        image_token_index=IMAGE,
        boi_token_index=OPEN,
        eoi_token_index=CLOSE,
    )
    model = build(config, seed)
    # transformers starts this weight at zero, which would make every visual token the same.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)
    return model


def gemma3(seed: int = 0) -> tuple[Any, dict[str, Any]]:
    one = [OPEN, *[IMAGE] * 4, CLOSE]
    batch = sequences([1, *one, 5, *one, 6, 7, 8], [1, *one, 9, 10])
    batch["token_type_ids"] = (batch["input_ids"] == IMAGE).long()
    return gemma(seed=seed), {**batch, "pixel_values": pixels(3, 3, 16, 16, seed=seed)}


def smolvlm(seed: int = 0) -> tuple[Any, dict[str, Any]]:
    config = SmolVLMConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**VISION, "model_type": "smolvlm_vision"},
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    fake, whole, newline = 90, 91, 95
    run = [IMAGE] * 4
    # A picture in 1 × 2 tiles and its global view; then pictures in one piece.
    tiled = [fake, 92, *run, fake, 93, *run, newline, newline, fake, whole, *run, fake]
    single = [fake, whole, *run, fake]
    batch = sequences([1, *tiled, *single, 6, 7, 8], [1, *single, 9, 10])
    images = pixels(2, 4, 3, 16, 16, seed=seed)
    images[1, 1:] = 0.0  # padding pictures of the second sample
    return build(config, seed), {**batch, "pixel_values": images}


FAMILIES: dict[str, Callable[..., tuple[Any, dict[str, Any]]]] = {
    "llava-clip-llama": llava_clip_llama,
    "llava-siglip-qwen2": llava_siglip_qwen2,
    "qwen2.5-vl": qwen2_5_vl,
    "internvl": internvl,
    "gemma3": gemma3,
    "smolvlm": smolvlm,
}
# Visual tokens of the three pictures of each family's batch.
TOKENS = {
    "llava-clip-llama": [16, 16, 16],
    "llava-siglip-qwen2": [16, 16, 16],
    "qwen2.5-vl": [4, 6, 4],
    "internvl": [12, 4, 4],
    "gemma3": [4, 4, 4],
    "smolvlm": [12, 4, 4],
}
