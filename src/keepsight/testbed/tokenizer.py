"""The testbed's word-level tokenizer and its chat template."""

from __future__ import annotations

from functools import cache

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from keepsight.testbed.language import words

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>", "<|user|>", "<|assistant|>")

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
