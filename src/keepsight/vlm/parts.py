"""Read the two parts of an assembled model: a vision encoder and a causal language model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # older releases: elsewhere torchvision
from transformers.models.auto.modeling_auto import MODEL_MAPPING


def load_vision(source: Any, image_processor: Any, dtype: torch.dtype, remote: bool) -> tuple[nn.Module, Any]:
    """The encoder (a directory, a hub id or a loaded model) in `dtype` on the CPU, and its image processor."""
    if isinstance(source, nn.Module):
        if image_processor is None:
            raise ValueError(
                f"vision is a loaded {type(source).__name__} without image_processor: pass image_processor=…, or "
                "the directory that holds both"
            )
        model = getattr(source, "vision_model", source)  # of a whole CLIP or SigLIP, its vision tower
        return _copied(model, dtype), image_processor
    config = AutoConfig.from_pretrained(source, trust_remote_code=remote)
    config = getattr(config, "vision_config", config)
    if type(config) not in MODEL_MAPPING:
        raise ValueError(
            f"vision {str(source)!r} has model type {config.model_type!r}, which transformers cannot build as an "
            "encoder: use a CLIP, SigLIP, DINOv2 or ViT checkpoint, or pass a loaded model"
        )
    model = _load_whole(MODEL_MAPPING[type(config)], source, dtype, remote)
    processor = image_processor or AutoImageProcessor.from_pretrained(source, trust_remote_code=remote)
    return model, processor


def load_language(source: Any, tokenizer: Any, dtype: torch.dtype, remote: bool) -> tuple[Any, Any]:
    """The causal language model in `dtype` on the CPU, and its tokenizer (a copy, if one was given)."""
    if isinstance(source, nn.Module):
        if tokenizer is None:
            raise ValueError(
                f"language is a loaded {type(source).__name__} without tokenizer: pass tokenizer=…, or the "
                "directory that holds both"
            )
        return _copied(source, dtype), copy.deepcopy(tokenizer)
    model = _load_whole(AutoModelForCausalLM, source, dtype, remote)
    return model, copy.deepcopy(tokenizer) or AutoTokenizer.from_pretrained(source, trust_remote_code=remote)


def _load_whole(cls: Any, source: Any, dtype: torch.dtype, remote: bool) -> Any:
    """Load safetensors weights; a weight that is not in the checkpoint would be random, so it is an error."""
    model, info = cls.from_pretrained(
        source, dtype=dtype, use_safetensors=True, trust_remote_code=remote, output_loading_info=True
    )
    missing = sorted(info["missing_keys"]) + [str(key) for key in info["mismatched_keys"]]
    if missing:
        raise ValueError(
            f"{str(source)!r} lacks {len(missing)} weights of {type(model).__name__} (first: {missing[0]}), which "
            "would stay random: use a complete checkpoint, or load the model yourself and pass it"
        )
    return model.eval()


def _copied(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy on the CPU with its parameters in `dtype`; buffers (rotary frequencies) keep their precision."""
    copied = copy.deepcopy(model).cpu()
    for parameter in copied.parameters():
        parameter.data = parameter.data.to(dtype)
    return copied.eval()
