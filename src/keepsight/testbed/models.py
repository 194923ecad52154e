"""The testbed's parts as standard transformers models: a tiny CLIP vision encoder, tiny Llama- and Qwen2-style
language models, a word-level tokenizer and a LLaVA processor; pretrained by `keepsight.testbed.pretrain`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from keepsight.testbed.language import words
from keepsight.testbed.scenes import IMAGE_SIZE
from keepsight.vlm.assemble import assemble

WEIGHTS = Path(__file__).parent / "weights"
PATCH = 8
SIDE = IMAGE_SIZE // PATCH  # patches along one side of a picture
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>", "<|user|>", "<|assistant|>")
Language = Literal["llama", "qwen2"]
LANGUAGES: tuple[Language, ...] = ("llama", "qwen2")
LAYERS = 8  # of a language model
FIRST_TAUGHT = (0, 3, 6)  # of them, those that a short language model is pretrained with

# `generation` marks what the assistant says, so that `return_assistant_tokens_mask` works for training.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' <|assistant|> ' }}"
    "{% generation %}{{ message['content'] + ' ' + eos_token }}{% endgeneration %}"
    "{% else %}{{ ' <|user|> ' + message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' <|assistant|>' }}{% endif %}"
)


@cache
def vocabulary() -> dict[str, int]:
    """Word → token id, special tokens first."""
    return {token: i for i, token in enumerate([*SPECIAL, *words()])}


def load_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer: lower-cased, split at spaces and punctuation, with the chat template."""
    tokenizer = Tokenizer(tokenizer_models.WordLevel(vocabulary(), unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="right",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": "<image>", "user_token": "<|user|>", "assistant_token": "<|assistant|>"},
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


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
    _start_looking_up(model)
    return model


@torch.no_grad()
def _start_looking_up(model: LlamaForCausalLM | Qwen2ForCausalLM, sharpness: float = 0.7, planes: int = 6) -> None:
    """Attention weights from which looking things up is learned in hundreds of steps instead of many thousands.

    The heads of the first layer look one, two, three and four tokens back; those of the others at tokens like their own
    (queries and keys start equal, after mimetic initialisation, Trockman and Kolter 2023). Looking back by a fixed
    distance needs a query and a key that do not depend on the token, so channel 0 of the embedding starts at one for
    all; the two are apart by the angle that rotary embedding turns over that distance, in its fastest `planes` planes.
    """
    config, layers = model.config, model.model.layers
    width = config.hidden_size // config.num_attention_heads
    half = width // 2
    assert config.rope_parameters is not None
    base = float(config.rope_parameters["rope_theta"])  # type: ignore[arg-type]
    angle = base ** -(torch.arange(planes) / half)  # [planes], radians a token
    model.model.embed_tokens.weight[:, 0] = 1.0
    query, key = layers[0].self_attn.q_proj.weight, layers[0].self_attn.k_proj.weight  # [heads · width, d]
    query.mul_(0.3)
    key.mul_(0.3)
    for head in range(config.num_attention_heads):
        rows = head * width + torch.arange(planes)
        back = angle * (head + 1)
        query[rows, 0], query[rows + half, 0] = sharpness, 0.0
        key[rows, 0], key[rows + half, 0] = sharpness * back.cos(), sharpness * back.sin()
    for layer in layers[1:]:
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)


@torch.no_grad()
def deepened(short: LlamaForCausalLM, seed: int) -> LlamaForCausalLM:
    """A language model of all `LAYERS` that computes what `short` does: its layers become those of `FIRST_TAUGHT`, the
    others add nothing yet. Short models learn the same in a third of the time."""
    model = cast(LlamaForCausalLM, new_language_model("llama", seed))
    taught = dict(zip(FIRST_TAUGHT, short.model.layers, strict=True))
    for index, layer in enumerate(model.model.layers):
        if index in taught:
            layer.load_state_dict(taught[index].state_dict())
        else:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    for name in ("embed_tokens", "norm"):
        getattr(model.model, name).load_state_dict(getattr(short.model, name).state_dict())
    model.lm_head.load_state_dict(short.lm_head.state_dict())
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
