"""Tiny random models of every family of the support table, with batches made by hand, as in `tests/tiny.py`.

A batch holds two samples, the first with two pictures and the second with one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import (
    AyaVisionConfig,
    CLIPVisionConfig,
    Cohere2Config,
    DeepseekVLConfig,
    Florence2Config,
    GemmaConfig,
    Glm4vConfig,
    GotOcr2Config,
    Idefics2Config,
    Idefics3Config,
    JanusConfig,
    Llama4Config,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextVideoConfig,
    LlavaOnevisionConfig,
    Mistral3Config,
    MistralConfig,
    MllamaConfig,
    Ovis2Config,
    PaliGemmaConfig,
    PixtralVisionConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SiglipVisionConfig,
    VipLlavaConfig,
)

from tests import tiny
from tests.tiny import CLOSE, IMAGE, OPEN, TEXT, VISION, build, pixels, sequences

Batch = dict[str, Any]
CLIP = {**VISION, "model_type": "clip_vision_model"}
SIGLIP = {**VISION, "model_type": "siglip_vision_model"}
LLAMA, QWEN2 = {**TEXT, "model_type": "llama"}, {**TEXT, "model_type": "qwen2"}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
PINPOINTS = [[16, 32], [32, 16], [32, 32]]
SIZES = [(32, 32), (8, 32), (32, 8)]  # of the pictures of newline families: 2 × 2 tiles, and two that are padded


def around(one: list[int], second: list[int] | None = None, third: list[int] | None = None) -> Batch:
    """The two samples around three pictures' tokens."""
    second, third = second or one, third or one
    return sequences([1, *one, 5, *second, 6, 7, 8], [1, *third, 9, 10])


def square(tokens: int = 16, seed: int = 0) -> Batch:
    """Three pictures of 16 × 16 pixels."""
    return {**around([OPEN, *[IMAGE] * tokens, CLOSE]), "pixel_values": pixels(3, 3, 16, 16, seed=seed)}


def merged(patch_pixels: tuple[int, ...], types: bool = True, seed: int = 0) -> Batch:
    """`image_grid_thw`: pictures of 4, 6 and 4 tokens, four patches to a token."""
    grids = [(1, 4, 4), (1, 4, 6), (1, 2, 8)]
    batch = around(*([OPEN, *[IMAGE] * (h * w // 4), CLOSE] for _, h, w in grids))
    if types:
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).int()
    patches = sum(h * w for _, h, w in grids)
    return {**batch, "pixel_values": pixels(patches, *patch_pixels, seed=seed), "image_grid_thw": torch.tensor(grids)}


def newline_tiles(seed: int = 0) -> Batch:
    """16 tokens of the whole, then the tiles' mosaic without its padding, a newline after each row."""
    # 8 × 8 tokens of 2 × 2 tiles; then two tiles of which half of the rows, or of the columns, are padding.
    runs = [16 + 8 * (8 + 1), 16 + 2 * (8 + 1), 16 + 8 * (2 + 1)]
    images = pixels(3, 5, 3, 16, 16, seed=seed)
    images[1:, 3:] = 0.0  # padding to the most tiles
    return {
        **around(*([IMAGE] * run for run in runs)),
        "pixel_values": images,
        "image_sizes": torch.tensor(SIZES),
    }


def llava_next(seed: int = 0) -> tuple[Any, Batch]:
    config = LlavaNextConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**VISION, projection_dim=32),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return build(config, seed), newline_tiles(seed)


def llava_next_video(seed: int = 0) -> tuple[Any, Batch]:
    config = LlavaNextVideoConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**VISION, projection_dim=32),
        image_token_index=IMAGE,
        video_token_index=96,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return build(config, seed), newline_tiles(seed)


def llava_onevision(seed: int = 0) -> tuple[Any, Batch]:
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**TEXT),
        vision_config=SiglipVisionConfig(**VISION),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )
    return build(config, seed), newline_tiles(seed)


def vipllava(seed: int = 0) -> tuple[Any, Batch]:
    config = VipLlavaConfig(
        text_config=LLAMA, vision_config=CLIP, image_token_index=IMAGE, vision_feature_layers=[-1, -2, -1]
    )
    return build(config, seed), square(seed=seed)


def pixtral(seed: int = 0) -> tuple[Any, Batch]:
    config = LlavaConfig(
        text_config=MistralConfig(**TEXT, head_dim=8),
        vision_config=PixtralVisionConfig(**{**VISION, "head_dim": 8}),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return build(config, seed), sized(1, seed)


def sized(merge: int, seed: int) -> Batch:
    """Pictures of their own sizes, padded on the right and below; a break token after each row."""
    sizes = [(16, 16), (16, 8), (8, 16)]
    side = 4 * merge
    spans = [[IMAGE] * (w // side) + [90] for _, w in sizes]
    batch = around(*(span * (h // side) for span, (h, _) in zip(spans, sizes, strict=True)))
    return {**batch, "pixel_values": pixels(3, 3, 16, 16, seed=seed), "image_sizes": torch.tensor(sizes)}


def mistral3(seed: int = 0) -> tuple[Any, Batch]:
    config = Mistral3Config(
        text_config=MistralConfig(**TEXT, head_dim=8),
        vision_config=PixtralVisionConfig(**{**VISION, "head_dim": 8}),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return build(config, seed), sized(2, seed)


def paligemma(seed: int = 0) -> tuple[Any, Batch]:
    config = PaliGemmaConfig(
        text_config=GemmaConfig(**TEXT, head_dim=8),
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        image_token_index=IMAGE,
        projection_dim=32,
    )
    batch = square(seed=seed)
    batch["token_type_ids"] = (batch["input_ids"] != IMAGE).long() * 0  # all of it prefix
    return build(config, seed), batch


def aya_vision(seed: int = 0) -> tuple[Any, Batch]:
    config = AyaVisionConfig(
        text_config=Cohere2Config(**{**TEXT, "sliding_window": 64}),
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        image_token_index=IMAGE,
        downsample_factor=2,
    )
    run, whole = [IMAGE] * 4, 91
    tiled = [OPEN, 92, *run, 93, *run, whole, *run, CLOSE]
    single = [OPEN, whole, *run, CLOSE]
    return build(config, seed), {**around(tiled, single, single), "pixel_values": pixels(5, 3, 16, 16, seed=seed)}


def got_ocr2(seed: int = 0) -> tuple[Any, Batch]:
    vision = {**VISION, "image_size": 64, "mlp_dim": 64, "output_channels": 8, "window_size": 2}
    config = GotOcr2Config(
        text_config=QWEN2,
        vision_config={**vision, "global_attn_indexes": [1], "initializer_range": 0.02},
        image_token_index=IMAGE,
        image_seq_length=16,
    )
    tiled, single = [OPEN, *[IMAGE] * 48, CLOSE], [OPEN, *[IMAGE] * 16, CLOSE]
    return build(config, seed), {**around(tiled, single, single), "pixel_values": pixels(5, 3, 64, 64, seed=seed)}


def ovis2(seed: int = 0) -> tuple[Any, Batch]:
    config = Ovis2Config(
        text_config=QWEN2,
        vision_config={**VISION, "vocab_size": 64, "hidden_stride": 2},
        image_token_id=IMAGE,
        visual_indicator_token_ids=[91, 92, 93, 94, 95],
        hidden_size=32,
        vocab_size=100,
    )
    run, (start, end, split, column, row) = [IMAGE] * 4, (91, 92, 93, 94, 95)
    tiled = [start, *run, split, *run, column, *run, row, *run, column, *run, end]  # the whole, then 2 × 2 tiles
    single = [start, *run, split, end]
    return build(config, seed), {**around(tiled, single, single), "pixel_values": pixels(7, 3, 16, 16, seed=seed)}


def qwen2_vl(seed: int = 0) -> tuple[Any, Batch]:
    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE},
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 32,
            "mlp_ratio": 2,
            "num_heads": 4,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=IMAGE,
        video_token_id=96,
        vision_start_token_id=OPEN,
        vision_end_token_id=CLOSE,
    )
    return build(config, seed), merged((3 * 2 * 4 * 4,), seed=seed)


QWEN3_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 16,
}


def qwen3_vl(seed: int = 0) -> tuple[Any, Batch]:
    config = Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 8, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        vision_config={**QWEN3_VISION, "deepstack_visual_indexes": [0, 1]},
        image_token_id=IMAGE,
        video_token_id=96,
        vision_start_token_id=OPEN,
        vision_end_token_id=CLOSE,
    )
    return build(config, seed), merged((3 * 2 * 4 * 4,), seed=seed)


def qwen3_5(seed: int = 0) -> tuple[Any, Batch]:
    config = transformers.Qwen3_5Config(
        text_config={
            **TEXT,
            "head_dim": 8,
            "rope_parameters": {**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0},
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
        vision_config=QWEN3_VISION,
        image_token_id=IMAGE,
        video_token_id=96,
        vision_start_token_id=OPEN,
        vision_end_token_id=CLOSE,
    )
    return build(config, seed), merged((3 * 2 * 4 * 4,), seed=seed)


def glm4v(seed: int = 0) -> tuple[Any, Batch]:
    config = Glm4vConfig(
        text_config={**TEXT, "rope_parameters": MROPE},
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": 32,
            "image_size": 16,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=IMAGE,
        video_token_id=96,
        image_start_token_id=OPEN,
        image_end_token_id=CLOSE,
        video_start_token_id=94,
        video_end_token_id=95,
    )
    return build(config, seed), merged((3 * 2 * 4 * 4,), seed=seed)


def kimi_k25(seed: int = 0) -> tuple[Any, Batch]:
    config = transformers.Kimi_K25Config(
        text_config={
            **TEXT,
            "model_type": "deepseek_v3",
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        vision_config={**VISION, "pos_emb_height": 8, "pos_emb_width": 8, "merge_kernel_size": [2, 2]},
        projection_hidden_size=32,
        image_token_id=IMAGE,
        video_token_id=96,
        vision_start_token_id=OPEN,
        vision_end_token_id=CLOSE,
    )
    return build(config, seed), merged((3, 4, 4), types=False, seed=seed)


def idefics2(seed: int = 0) -> tuple[Any, Batch]:
    config = Idefics2Config(
        text_config={**TEXT, "model_type": "mistral"},
        vision_config={**VISION, "model_type": "idefics2_vision"},
        perceiver_config={
            "model_type": "idefics2_perceiver",
            "hidden_size": 32,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 1,
        },
        image_token_id=IMAGE,
    )
    one = [90, *[IMAGE] * 4, 90]
    images = pixels(2, 2, 3, 16, 16, seed=seed)
    images[1, 1:] = 0.0
    return build(config, seed), {
        **sequences([1, *one, *one[1:], 6, 7, 8], [1, *one, 9, 10]),  # adjacent pictures share what marks them
        "pixel_values": images,
    }


def idefics3(seed: int = 0) -> tuple[Any, Batch]:
    config = Idefics3Config(
        text_config=LLAMA,
        vision_config={**VISION, "model_type": "idefics3_vision"},
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    return build(config, seed), tiny.smolvlm(seed)[1]


def janus(seed: int = 0) -> tuple[Any, Batch]:
    config = JanusConfig(
        text_config=LLAMA,
        vision_config={**VISION, "projection_dim": 32, "num_image_tokens": 16, "mlp_ratio": 2.0},
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 16,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "num_patches": 4,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
        },
        image_token_id=IMAGE,
    )
    return build(config, seed), square(seed=seed)


def deepseek_vl(seed: int = 0) -> tuple[Any, Batch]:
    config = DeepseekVLConfig(text_config=LLAMA, vision_config=SIGLIP, image_token_id=IMAGE)
    return build(config, seed), square(seed=seed)


def llama4(seed: int = 0) -> tuple[Any, Batch]:
    config = Llama4Config(
        text_config={
            **TEXT,
            "intermediate_size_mlp": 64,
            "head_dim": 8,
            "num_local_experts": 2,
            "attention_chunk_size": 256,
        },
        vision_config={
            **VISION,
            "intermediate_size": 128,
            "vision_output_dim": 24,
            "projector_input_dim": 24,
            "projector_output_dim": 24,
        },
        boi_token_index=OPEN,
        eoi_token_index=CLOSE,
        image_token_index=IMAGE,
    )
    run, whole, column, row = [IMAGE] * 4, 91, 94, 95
    tiled = [OPEN, *run, column, *run, row, whole, *run, CLOSE]
    single = [OPEN, whole, *run, CLOSE]
    return build(config, seed), {**around(tiled, single, single), "pixel_values": pixels(5, 3, 16, 16, seed=seed)}


def mllama(seed: int = 0) -> tuple[Any, Batch]:
    config = MllamaConfig(
        text_config={
            **TEXT,
            "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        vision_config={
            **VISION,
            "num_global_layers": 1,
            "attention_heads": 4,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
        },
        image_token_index=IMAGE,
    )
    return build(config, seed), {}


def florence2(seed: int = 0) -> tuple[Any, Batch]:
    config = Florence2Config(
        text_config={
            "model_type": "bart",
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "vocab_size": 100,
        },
        vision_config={
            "depths": [1],
            "patch_size": [4],
            "patch_stride": [4],
            "patch_padding": [0],
            "patch_prenorm": [False],
            "embed_dim": [32],
            "num_heads": [4],
            "num_groups": [4],
            "window_size": 4,
            "projection_dim": 32,
        },
        image_token_id=IMAGE,
    )
    return build(config, seed), {}


@dataclass(frozen=True)
class Family:
    """A row of the support table.

    model_type: as in the configuration; make: `(seed) -> (model, batch)`; tokens: of each of the three pictures;
    remark: what a user must know; places: whether a token stands for a place of the picture; refused: the error's text
    about what is missing, of families that cannot work.
    """

    model_type: str
    make: Callable[..., tuple[Any, Batch]]
    tokens: tuple[int, ...] = ()
    remark: str = ""
    places: bool = True
    refused: str = ""


TILES = "tiles and their thumbnail are one picture"
FAMILIES = {
    "LLaVA (CLIP + Llama)": Family("llava", tiny.llava_clip_llama, (16, 16, 16)),
    "LLaVA (SigLIP + Qwen2)": Family("llava", tiny.llava_siglip_qwen2, (16, 16, 16)),
    "Pixtral": Family("llava", pixtral, (16, 8, 8), "pictures keep their shape"),
    "LLaVA-NeXT": Family(
        "llava_next", llava_next, (80, 32, 32), "newline tokens left out; the mosaic counts as one tile"
    ),
    "LLaVA-NeXT-Video": Family(
        "llava_next_video", llava_next_video, (80, 32, 32), "pictures as in LLaVA-NeXT; films are not visual tokens"
    ),
    "LLaVA-OneVision": Family(
        "llava_onevision", llava_onevision, (80, 32, 32), "newline tokens left out; the mosaic counts as one tile"
    ),
    "VipLLaVA": Family("vipllava", vipllava, (16, 16, 16)),
    "InternVL": Family("internvl", tiny.internvl, (12, 4, 4), TILES),
    "PaliGemma": Family("paligemma", paligemma, (16, 16, 16), "image tokens attend to the whole prompt"),
    "Gemma 3": Family("gemma3", tiny.gemma3, (4, 4, 4), "image tokens attend to each other; pan and scan off"),
    "Aya Vision": Family("aya_vision", aya_vision, (12, 4, 4), TILES),
    "GOT-OCR 2": Family(
        "got_ocr2",
        got_ocr2,
        (48, 16, 16),
        f"{TILES}, and so are the pages of `multi_page=True`; a token sees into its neighbours, by its convolutions",
    ),
    "Ovis2": Family("ovis2", ovis2, (20, 4, 4), TILES),
    "Qwen2-VL": Family("qwen2_vl", qwen2_vl, (4, 6, 4)),
    "Qwen2.5-VL": Family("qwen2_5_vl", tiny.qwen2_5_vl, (4, 6, 4)),
    "Qwen3-VL": Family(
        "qwen3_vl", qwen3_vl, (4, 6, 4), "deepstack: `h[l]` is what layer l puts out, before vision features are added"
    ),
    "Qwen3.5": Family("qwen3_5", qwen3_5, (4, 6, 4)),
    "GLM-4V": Family("glm4v", glm4v, (4, 6, 4)),
    "Kimi K2.5": Family("kimi_k25", kimi_k25, (4, 6, 4)),
    "Mistral 3": Family("mistral3", mistral3, (4, 2, 2), "pictures keep their shape"),
    "Idefics2": Family(
        "idefics2",
        idefics2,
        (4, 4, 4),
        "a resampler's queries, which stand for no place: each predicts itself; crops of `do_image_splitting` count as "
        "pictures",
        places=False,
    ),
    "Idefics3": Family("idefics3", idefics3, (12, 4, 4), TILES),
    "SmolVLM": Family("smolvlm", tiny.smolvlm, (12, 4, 4), TILES),
    "Janus": Family("janus", janus, (16, 16, 16)),
    "DeepSeek-VL": Family("deepseek_vl", deepseek_vl, (16, 16, 16)),
    "Llama 4": Family("llama4", llama4, (12, 4, 4), TILES),
    "Llama 3.2 Vision": Family(
        "mllama",
        mllama,
        refused="its image features reach the decoder by cross-attention, so it has no visual tokens to follow",
    ),
    "Florence-2": Family(
        "florence2", florence2, refused="its visual tokens go to the BART encoder, not to the decoder"
    ),
}
# Families that came after the oldest release that is supported.
UNKNOWN = [name for name, family in FAMILIES.items() if family.model_type not in transformers.CONFIG_MAPPING]
WORKING = [name for name, family in FAMILIES.items() if not family.refused and name not in UNKNOWN]
REFUSED = [name for name, family in FAMILIES.items() if family.refused]
