"""One conversation → model inputs, with labels on the assistant's tokens only. Ours; works through any processor."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from keepsight.images import open_image, refused
from keepsight.training.conversations import Conversation, ConversationError
from keepsight.training.spans import TemplateError, assistant_spans, carry_over, image_markers, overlapping
from keepsight.vlm.chat import render_prompt, special_tokens

IGNORED = -100  # the label of tokens that the loss leaves out
Prepare = Callable[[list[Image.Image], Any], dict[str, Tensor]]  # pictures, processor → further picture tensors


class CutError(ValueError):
    """A sample that `max_length` would cut through a picture, or leave without any answer."""


@dataclass(frozen=True)
class Encoded:
    """One sample, not yet padded.

    Attributes:
        sequence: tensors of shape [S], among them `input_ids`, `attention_mask` and `labels`.
        media: the picture tensors as the processor gives them, the first dimension counting pictures or tiles.
        cut: tokens that `max_length` left out at the end.
    """

    sequence: dict[str, Tensor]
    media: dict[str, Tensor]
    cut: int = 0

    @property
    def nbytes(self) -> int:
        """Memory held by the tensors."""
        return sum(tensor.nbytes for tensor in (*self.sequence.values(), *self.media.values()))


class Encoder:
    """Turns conversations into model inputs with a HuggingFace processor.

    Args:
        processor: any image-text processor with a chat template and a fast tokenizer.
        max_length: longest sequence, pictures included; longer text is cut at its end, a picture never is.

    Attributes:
        prepare: makes further picture tensors from the pictures themselves (`Handle.prepare`), or None.

    Raises:
        TemplateError: if the processor has no chat template, its tokenizer gives no character offsets, or its
            template writes no image token.
    """

    def __init__(self, processor: Any, max_length: int | None = None) -> None:
        name = type(processor).__name__
        if not getattr(processor.tokenizer, "is_fast", False):
            raise TemplateError(
                f"the tokenizer of {name} is {type(processor.tokenizer).__name__}, which gives no character offsets; "
                "a fast tokenizer (tokenizer.json) is needed to find the answers' tokens."
            )
        if not (getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)):
            raise TemplateError(
                f"{name} has no chat template, so conversations cannot be written out; set `processor.chat_template`."
            )
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length is {max_length}; allowed: 1 or more, or none for no limit.")
        self.processor = processor
        self.max_length = max_length
        self.prepare: Prepare | None = None
        self.markers = image_markers(processor)
        ids = getattr(processor, "image_token_ids", None) or [getattr(processor, "image_token_id", None)]
        self.image_ids = frozenset(self.markers) | {int(index) for index in ids if index is not None}

    def __call__(self, conversation: Conversation) -> Encoded:
        """Decode the pictures and encode the conversation.

        Raises:
            ImageError: if a picture cannot be read, or the processor does not take it.
            CutError: if `max_length` would cut a picture's tokens, or leave no answer.
            ConversationError: if a text holds the model's own image token.
        """
        self._refuse_markers(conversation)
        images = [open_image(source, name) for name, source in conversation.images]
        text, spans = assistant_spans(self.processor, conversation.messages)
        extra = special_tokens(self.processor, text)
        try:
            batch = self.processor(text=[text], images=[images] if images else None, return_tensors="pt", **extra)
        except Exception:  # which kind, depends on the processor
            for (name, _), image in zip(conversation.images, images, strict=True):
                self._try(image, name)
            raise
        ids = batch["input_ids"][0]
        plain = self.processor.tokenizer(text, return_offsets_mapping=True, **extra)
        labelled = carry_over(
            plain["input_ids"],
            overlapping(plain["offset_mapping"], spans),
            frozenset(self.markers),
            ids.tolist(),
        )
        sequence = {
            key: value[0]
            for key, value in batch.items()
            if isinstance(value, Tensor) and value.shape == batch["input_ids"].shape
        }
        media = {key: value for key, value in batch.items() if key not in sequence and isinstance(value, Tensor)}
        if images and self.prepare is not None:
            media |= self.prepare(images, self.processor)
        sequence["labels"] = torch.where(torch.tensor(labelled), ids, IGNORED)
        return self._cut(conversation, sequence, media)

    def _try(self, image: Image.Image, name: str) -> None:
        """Raises ImageError if the processor does not take this picture alone."""
        text = render_prompt(self.processor, "?")
        try:
            self.processor(text=[text], images=[[image]], return_tensors="pt", **special_tokens(self.processor, text))
        except Exception as cause:
            raise refused(image, name, cause) from cause

    def _cut(self, conversation: Conversation, sequence: dict[str, Tensor], media: dict[str, Tensor]) -> Encoded:
        length, limit = sequence["input_ids"].numel(), self.max_length
        if limit is None or length <= limit:
            return Encoded(sequence, media)
        lost = sum(token in self.image_ids for token in sequence["input_ids"][limit:].tolist())
        kept = {key: value[:limit].clone() for key, value in sequence.items()}
        if lost:
            raise CutError(
                f"it has {length} tokens and max_length is {limit}: {lost} image tokens would be cut "
                f"off. Raise max_length to {length}, use smaller or fewer pictures, or pass --skip-broken to leave "
                "such entries out and count them."
            )
        if bool((kept["labels"] == IGNORED).all()):
            raise CutError(
                f"it has {length} tokens and max_length is {limit}: no answer would be left. Raise "
                "max_length, shorten the question, or pass --skip-broken to leave such entries out and count them."
            )
        return Encoded(kept, media, cut=length - limit)

    def _refuse_markers(self, conversation: Conversation) -> None:
        for message in conversation.messages:
            for part in message["content"]:
                for token in self.markers.values():
                    if token in part.get("text", ""):
                        raise ConversationError(
                            f"{conversation.name} writes the model's image token {token!r} in its text; "
                            "use <image>, once for each picture."
                        )
