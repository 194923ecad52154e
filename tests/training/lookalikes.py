"""The paper's parts: their published sizes, and small look-alikes of the same families and depth on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

CLIP, SIGLIP = "openai/clip-vit-large-patch14-336", "google/siglip2-so400m-patch14-384"
VICUNA, QWEN = "lmsys/vicuna-7b-v1.5", "Qwen/Qwen2.5-7B-Instruct"
# config.json of the published checkpoints, as far as it decides about sizes.
REAL: dict[str, dict[str, Any]] = {
    CLIP: {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
    SIGLIP: {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
    VICUNA: {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    QWEN: {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    },
}
TOKENS = {VICUNA: 32000, QWEN: 151665}  # of the tokenizers; Qwen's table has spare rows
ANCHORS = {"facebook/dinov2-base": 768, "facebook/dinov2-large": 1024}  # width
VISION_SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION_SMALL |= {"image_size": 28, "patch_size": 14, "initializer_range": 0.5}  # so that patches differ in bfloat16
LANGUAGE_SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
LANGUAGE_SMALL |= {"initializer_range": 0.5}  # so that states differ by more than the head's bias
LANGUAGE_SMALL |= {"vocab_size": 64}


def encoder(name: str, sizes: dict[str, Any]) -> Any:
    return (
        CLIPVisionModel(CLIPVisionConfig(**sizes)) if name == CLIP else SiglipVisionModel(SiglipVisionConfig(**sizes))
    )


def language_model(name: str, sizes: dict[str, Any]) -> Any:
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return (
        LlamaForCausalLM(LlamaConfig(**sizes, **ends))
        if name == VICUNA
        else Qwen2ForCausalLM(Qwen2Config(**sizes, **ends))
    )


def pictures_of(name: str, side: int) -> Any:
    if name == CLIP:
        return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return SiglipImageProcessorPil(size={"height": side, "width": side})


def tokenizer(words: int) -> PreTrainedTokenizerFast:
    """So many words, with unk as the pad token, as Vicuna's tokenizer has it."""
    known = ["<unk>", "<s>", "</s>", "USER", "ASSISTANT", ":", "what", "color", "?", "red", "blue"]
    vocabulary = {word: index for index, word in enumerate([*known, *map(str, range(words - len(known)))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def write_small_parts(folder: Path) -> dict[str, str]:
    """Parts of width 16 on disk, the decoders as deep as the real ones; hub id → directory."""
    torch.manual_seed(0)
    written = {name: folder / name.replace("/", "--") for name in (*REAL, *ANCHORS)}
    for name in (CLIP, SIGLIP):
        encoder(name, VISION_SMALL).save_pretrained(written[name])
        pictures_of(name, 28).save_pretrained(written[name])
    for name in (VICUNA, QWEN):
        depth = REAL[name]["num_hidden_layers"]
        language_model(name, {**LANGUAGE_SMALL, "num_hidden_layers": depth}).save_pretrained(written[name])
        tokenizer(60).save_pretrained(written[name])
    for name in ANCHORS:
        Dinov2Model(Dinov2Config(**VISION_SMALL, mlp_ratio=1)).save_pretrained(written[name])
        crop = {"height": 28, "width": 28}
        BitImageProcessorPil(size={"shortest_edge": 28}, crop_size=crop).save_pretrained(written[name])
    return {name: str(path) for name, path in written.items()}


def write_data(folder: Path) -> list[str]:
    """Eight questions about two pictures, and one without; the flags that name them for both stages."""
    entries = []
    for number, color in enumerate(["red", "blue"] * 4):
        Image.new("RGB", (40, 30), color).save(folder / f"{color}.png")
        turns = [{"from": "human", "value": "<image>\nwhat color ?"}, {"from": "gpt", "value": color}]
        entries.append({"id": str(number), "image": f"{color}.png", "conversations": turns})
    entries.append({"id": "text", "conversations": [turns[1] | {"from": "human"}, turns[1]]})
    (folder / "data.json").write_text(json.dumps(entries), encoding="utf-8")
    flags = []
    for stage in ("projector", "full"):
        flags += [f"--{stage}.data.conversations", str(folder / "data.json")]
        flags += [f"--{stage}.data.image-folder", str(folder)]
    return flags
