"""The testbed's parts as standard transformers models: a tiny CLIP vision encoder, tiny Llama- and Qwen2-style
language models and a LLaVA processor; pretrained by `keepsight.testbed.pretrain`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from keepsight.testbed._start import start_looking_up
from keepsight.testbed.scenes import IMAGE_SIZE
from keepsight.testbed.tokenizer import load_tokenizer, vocabulary
from keepsight.vlm.assemble import assemble

WEIGHTS = Path(__file__).parent / "weights"
PATCH = 8
SIDE = IMAGE_SIZE // PATCH  # patches along one side of a picture
Language = Literal["llama", "qwen2"]
LANGUAGES: tuple[Language, ...] = ("llama", "qwen2")
LAYERS = 8  # of a language model
LAYERS_AT_WORK = (
    "The drawn world's language models do nearly all their work in layers 1, 4 and 7 of their eight: they were taught "
    "with three and given the others late. So their curves over layers are steps, which those of real models are not."
)  # for whoever looks at such curves


def image_processor() -> CLIPImageProcessor:
    """Pictures to 64×64 RGB in -1 … 1."""
    return CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def encoder_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=128,
    )


def language_config(language: Language, layers: int = LAYERS) -> LlamaConfig | Qwen2Config:
    """Raises: ValueError for a language model that the testbed does not have."""
    kinds: dict[str, type[LlamaConfig] | type[Qwen2Config]] = {"llama": LlamaConfig, "qwen2": Qwen2Config}
    if language not in kinds:
        raise ValueError(f"unknown language model {language!r}; the testbed has {', '.join(LANGUAGES)}")
    tokens = vocabulary()
    return kinds[language](
        vocab_size=len(tokens),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.07,  # the default 0.02 suits widths of thousands; at 128 it slows the start
        tie_word_embeddings=False,
        pad_token_id=tokens["<pad>"],
        bos_token_id=tokens["<s>"],
        eos_token_id=tokens["</s>"],
    )


def new_encoder(seed: int) -> CLIPVisionModel:
    """The encoder with random weights drawn from `seed`; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPVisionModel(encoder_config())


def new_language_model(language: Language, seed: int, layers: int = LAYERS) -> LlamaForCausalLM | Qwen2ForCausalLM:
    """A language model with random weights drawn from `seed`; the global random state is left as it was."""
    config = language_config(language, layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config) if isinstance(config, LlamaConfig) else Qwen2ForCausalLM(config)
    start_looking_up(model)
    return model


def _fill(model: nn.Module, name: str, folder: Path) -> None:
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"the testbed's weights {path} are missing; reinstall keepsight, or make them with "
            "`python -m keepsight.testbed.pretrain`"
        )
    model.load_state_dict({key: value.float() for key, value in load_file(path).items()}, strict=True)


def load_encoder(folder: Path = WEIGHTS) -> CLIPVisionModel:
    """The pretrained vision encoder: 64 patches of 8×8 pixels, width 128, 4 layers, in eval mode.

    Raises:
        FileNotFoundError: the weights are not there.
    """
    model = new_encoder(0)
    _fill(model, "encoder", folder)
    return model.eval()


def load_language_model(language: Language = "llama", folder: Path = WEIGHTS) -> LlamaForCausalLM | Qwen2ForCausalLM:
    """A pretrained language model: 8 layers, width 128, in eval mode.

    Raises:
        ValueError: unknown language model.
        FileNotFoundError: the weights are not there.
    """
    model = new_language_model(language, 0)
    _fill(model, language, folder)
    return model.eval()


def join(
    encoder: CLIPVisionModel, language_model: LlamaForCausalLM | Qwen2ForCausalLM, seed: int = 0
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Encoder + fresh projector (drawn from `seed`) + language model as LLaVA, and its processor."""
    return assemble(
        encoder,
        language_model,
        tokenizer=load_tokenizer(),
        image_processor=image_processor(),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        seed=seed,
    )


def build_vlm(
    language: Language = "llama", seed: int = 0, *, aligned: bool = True, folder: Path = WEIGHTS
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The testbed's LLaVA-class model and its processor, ready for stage 2.

    Args:
        folder: where the weights are, the package's own by default.
        aligned: with the shipped stage-1 projector (captions, the rest frozen); False draws a fresh one from `seed`.

    Raises:
        ValueError: unknown language model.
        FileNotFoundError: the weights are not there.
    """
    model, processor = join(load_encoder(folder), load_language_model(language, folder), seed)
    if aligned:
        _fill(model.model.multi_modal_projector, f"projector-{language}", folder)
    return model, processor
