"""A vision encoder + a language model → a LLaVA-class model and its processor, in plain transformers classes.

The parts' weights go in bit for bit; only the projector is new, and the rows of added tokens. The result has
nothing of keepsight in it: `save_pretrained` writes a LLaVA checkpoint that plain transformers loads.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from keepsight.vlm.chat import image_chat_template
from keepsight.vlm.parts import load_language, load_vision
from keepsight.vlm.projector import initialise_projector, mean_embedding_norm, noise_pictures

IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"
CALIBRATION_PICTURES = 4


def assemble(
    vision: str | Path | Any,
    language: str | Path | Any,
    *,
    tokenizer: Any = None,
    image_processor: Any = None,
    vision_feature_layer: int = -2,
    vision_feature_select_strategy: str | None = None,
    image_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Join an encoder and a language model by a new two-layer projector.

    Args:
        vision, language: a directory, a hub id, or a loaded model. Only safetensors weights are read; of a
            CLIP or SigLIP checkpoint only the vision tower. A loaded model is copied, never changed.
        tokenizer, image_processor: needed with loaded models, else read from beside the weights.
        vision_feature_layer: which of the encoder's hidden states feeds the projector (0 = patch embedding,
            -1 = last; LLaVA uses -2).
        vision_feature_select_strategy: "default" drops the first token (CLS), "full" keeps all. None: as the
            encoder needs ("default" if it has a CLS token, else "full").
        image_size: side of the square input in pixels; None: the image processor's own. Encoders with fixed
            position embeddings (CLIP, SigLIP) take only their own size.
        dtype: of the whole model.
        seed: of the projector's weights, drawn from a generator of their own (the global one is untouched).
        trust_remote_code: run code that comes with a checkpoint. Off.

    Returns:
        the model, in eval mode on the CPU, and its processor. The tokenizer has `<image>` (and `<pad>`, if it
        had no pad token); new rows of the embedding and of the output layer are the mean of the others.

    Raises:
        ValueError: a part that cannot become a LLaVA (no plain patch grid, register tokens, a head that is
            more than a linear map), a strategy that contradicts the encoder, a layer that does not exist,
            a size that the encoder refuses, a checkpoint with weights missing.
    """
    vision_model, image_processor = load_vision(vision, image_processor, dtype, trust_remote_code)
    language_model, tokenizer = load_language(language, tokenizer, dtype, trust_remote_code)
    if image_size is not None:
        image_processor = _resized(image_processor, image_size)
    _check_layer(vision_model, vision_feature_layer)
    generator = torch.Generator().manual_seed(seed)
    hidden, (rows, columns) = _look(vision_model, image_processor, vision_feature_layer, generator)
    strategy, extra = _strategy(vision_model, hidden.shape[1], rows * columns, vision_feature_select_strategy)

    with torch.random.fork_rng(devices=[]):
        text_rows = _add_tokens(language_model, tokenizer)
        model = _join(vision_model, language_model, vision_feature_layer, strategy, dtype)
    model.config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    model.config.image_seq_length = rows * columns + (extra if strategy == "full" else 0)
    kept = hidden[:, 1:] if strategy == "default" else hidden
    target = mean_embedding_norm(model.get_input_embeddings(), text_rows)
    initialise_projector(model.model.multi_modal_projector, kept.flatten(0, 1), target, generator)

    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=_patch_size(vision_model),
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=extra,
        chat_template=image_chat_template(tokenizer.chat_template, IMAGE_TOKEN),
    )
    return model.eval(), processor


def _resized(image_processor: Any, side: int) -> Any:
    """A copy of the image processor that gives `side` × `side` pixels, keeping its resize-to-crop ratio."""
    settings = image_processor.to_dict()
    size, crop = dict(settings["size"]), settings.get("crop_size")
    if "shortest_edge" in size:
        old_crop = crop["height"] if crop else size["shortest_edge"]
        size = {"shortest_edge": round(size["shortest_edge"] * side / old_crop)}
    else:
        size = {"height": side, "width": side}
    settings["size"] = size
    if crop:
        settings["crop_size"] = {"height": side, "width": side}
    return type(image_processor).from_dict(settings)


def _patch_size(vision_model: Any) -> int:
    patch = getattr(vision_model.config, "patch_size", None)
    if not isinstance(patch, int):
        raise ValueError(
            f"vision encoder {vision_model.config.model_type!r} has patch_size {patch!r}; LLaVA needs one whole "
            "number (a plain ViT): use a CLIP, SigLIP, DINOv2 or ViT checkpoint"
        )
    return patch


def _check_layer(vision_model: Any, layer: int) -> None:
    depth = vision_model.config.num_hidden_layers
    if not -(depth + 1) <= layer <= depth:
        raise ValueError(
            f"vision_feature_layer {layer} does not exist: this encoder has {depth} layers, so {-(depth + 1)} to "
            f"{depth} are allowed (0 = patch embedding, -1 = last)"
        )


@torch.no_grad()
def _look(
    vision_model: Any, image_processor: Any, layer: int, generator: torch.Generator
) -> tuple[Tensor, tuple[int, int]]:
    """Hidden states [B, S, D] of calibration pictures, and the patch grid (rows, columns) of one picture."""
    patch = _patch_size(vision_model)
    pictures = noise_pictures(CALIBRATION_PICTURES, 256, generator)
    pixels = image_processor(pictures, return_tensors="pt")["pixel_values"].to(
        device=next(vision_model.parameters()).device, dtype=next(vision_model.parameters()).dtype
    )
    try:
        hidden = vision_model(pixels, output_hidden_states=True).hidden_states[layer]
    except (TypeError, ValueError, RuntimeError) as error:
        own = getattr(vision_model.config, "image_size", "unknown")
        raise ValueError(
            f"vision encoder {vision_model.config.model_type!r} refuses pictures of {pixels.shape[-2]}×"
            f"{pixels.shape[-1]} pixels ({error}): its own size is {own}; leave image_size unset, or use an "
            "encoder that interpolates its position embeddings (DINOv2)"
        ) from error
    return hidden, (pixels.shape[-2] // patch, pixels.shape[-1] // patch)


def _strategy(vision_model: Any, tokens: int, patches: int, asked: str | None) -> tuple[str, int]:
    """The select strategy and the number of tokens that are not patches (a CLS token), from what comes out."""
    family, extra = vision_model.config.model_type, tokens - patches
    if extra not in (0, 1):
        raise ValueError(
            f"vision encoder {family!r} gives {tokens} tokens for {patches} patches; LLaVA can drop one CLS token "
            "and nothing else (no registers): use a CLIP, SigLIP, DINOv2 or ViT checkpoint"
        )
    if asked not in (None, "default", "full"):
        raise ValueError(f"vision_feature_select_strategy {asked!r}: allowed are 'default', 'full' or None (chosen)")
    if asked == "default" and extra == 0:
        raise ValueError(
            f"vision_feature_select_strategy 'default' drops the first token, but encoder {family!r} has no CLS "
            f"token ({tokens} tokens for {patches} patches), so a patch would be lost: use 'full' or None"
        )
    return asked or ("default" if extra else "full"), extra


def _add_tokens(language_model: Any, tokenizer: Any) -> int:
    """Add `<image>` and a pad token where missing; returns the number of embeddings that text had before."""
    known = len(tokenizer)
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    table = language_model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > table:  # some tables have spare rows already (Qwen)
        language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for module in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
                weight = module.weight
                weight[table:] = weight[:table].float().mean(dim=0).to(weight.dtype)
    for config in (language_model.config, language_model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
    return min(known, table)


def _join(
    vision_model: Any, language_model: Any, layer: int, strategy: str, dtype: torch.dtype
) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=vision_model.config,
        text_config=language_model.config,
        vision_feature_layer=layer,
        vision_feature_select_strategy=cast(Literal["default", "full"], strategy),
        tie_word_embeddings=bool(language_model.config.tie_word_embeddings),
        dtype=dtype,
    )
    with torch.device("meta"):  # the parts' modules replace these: weights and buffers are never drawn twice
        model = LlavaForConditionalGeneration(config)
    decoder = language_model.get_decoder()
    if type(decoder) is not type(model.model.language_model):
        raise ValueError(
            f"language model {language_model.config.model_type!r} keeps its decoder in {type(decoder).__name__}, "
            f"where LLaVA needs {type(model.model.language_model).__name__}: use a Llama-, Qwen2- or "
            "Mistral-style causal language model"
        )
    head = language_model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise ValueError(
            f"language model {language_model.config.model_type!r} has {'no' if head is None else 'a bias in its'} "
            "output layer, which LLaVA cannot hold: use a Llama-, Qwen2- or Mistral-style causal language model"
        )
    model.model.vision_tower = vision_model
    model.model.language_model = decoder
    model.lm_head = head
    model.model.multi_modal_projector = type(model.model.multi_modal_projector)(config).to(dtype)
    model.generation_config = copy.deepcopy(language_model.generation_config)
    _check_same_logits(model, language_model)
    return model


@torch.no_grad()
def _check_same_logits(model: LlavaForConditionalGeneration, language_model: Any) -> None:
    """LLaVA's output layer is a bare matrix: a family that scales, caps or shifts its logits would change."""
    rows = model.lm_head.weight.shape[0]
    ids = torch.linspace(0, rows - 1, 8, device=model.lm_head.weight.device).long()[None]
    ours, theirs = model(input_ids=ids).logits, language_model(input_ids=ids).logits
    if not torch.equal(ours, theirs):
        raise ValueError(
            f"language model {language_model.config.model_type!r} gives other logits inside LLaVA (largest "
            f"difference {(ours - theirs).abs().max().item():.3g}), because its head is more than a matrix: use a "
            "Llama-, Qwen2- or Mistral-style causal language model"
        )
