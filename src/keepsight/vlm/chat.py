"""The chat template of an assembled model: pictures of a turn first, then its text; and what tokenizing it asks for.

A language model's own template expects `message["content"]` to be a string. A multimodal message carries a
list of `{"type": "image"}` and `{"type": "text", "text": ...}` parts. `image_chat_template` puts a few lines
before the language model's template that write such a list as `<image>` + newline for every picture, then the
text, and leaves the rest of the template as it is (system prompt, role marks, generation marks).
"""

from __future__ import annotations

from typing import Any

FALLBACK = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{ 'ASSISTANT: ' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{%- elif message['role'] == 'system' -%}"
    "{{ message['content'] + '\\n' }}"
    "{%- else -%}"
    "{{ 'USER: ' + message['content'] + '\\n' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT: ' }}{%- endif -%}"
)
"""For tokenizers without a template: `USER: …` and `ASSISTANT: …` lines, each answer closed by the end token."""

_FLATTEN = (
    "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}"
    "{%- set flat.messages = flat.messages + [message] -%}"
    "{%- else -%}"
    "{%- set turn = namespace(images='', text='') -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set turn.images = turn.images + 'IMAGE_TOKEN\\n' -%}"
    "{%- elif part['type'] == 'text' -%}{%- set turn.text = turn.text + part['text'] -%}"
    "{%- else -%}{{ raise_exception('a part of a message has type ' + part['type']"
    ' + \'; this model takes "image" and "text"\') }}'
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=turn.images + turn.text)] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)


def image_chat_template(template: str | None, image_token: str = "<image>") -> str:
    """The language model's chat `template` (None: `FALLBACK`), made to take messages with pictures.

    Within a turn the pictures come first, whatever their place in the list, as LLaVA-1.5 does; content that is
    already a string (with its own placeholders) passes unchanged.
    """
    return _FLATTEN.replace("IMAGE_TOKEN", image_token) + (template or FALLBACK)


def special_tokens(processor: Any, text: str) -> dict[str, bool]:
    """What to tell a processor that is about to tokenize `text`, written by its chat template.

    A template that writes the token of the beginning itself must not get a second one from the tokenizer; the same
    rule as in transformers' `apply_chat_template(tokenize=True)`.
    """
    bos = processor.tokenizer.bos_token
    return {"add_special_tokens": False} if bos is not None and text.startswith(bos) else {}


def render_prompt(processor: Any, prompt: str) -> str:
    """The chat template with the picture first, then the text; the same for every picture.

    Raises:
        ValueError: the processor has no chat template.
    """
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(
            f"{type(processor).__name__} has no chat template, so the model's prompt format is unknown; set "
            "processor.chat_template to that of the checkpoint"
        )
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    return processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
