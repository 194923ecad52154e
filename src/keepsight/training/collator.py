"""Samples of unequal length, with several pictures or none, → one padded batch. Ours."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from keepsight.training.encode import IGNORED, Encoded


class Collator:
    """Pads encoded samples into a batch that the model takes as keyword arguments.

    Sequences [S_i] become [B, S] with S the longest. Picture tensors are joined along their first dimension in the
    order of the samples, as HuggingFace models expect; where other dimensions differ (tiles, native resolutions)
    they are filled with zeros at the end, as the processors do. A batch without pictures has no picture tensors.

    Args:
        processor: gives the padding token.
        padding_side: "right" (usual in training) or "left".

    Raises:
        ValueError: for another side, or if the padding token is an image token.
    """

    def __init__(self, processor: Any, *, padding_side: Literal["right", "left"] = "right") -> None:
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side is {padding_side!r}; allowed: 'right', 'left'.")
        tokenizer = processor.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise ValueError("the tokenizer has neither a padding nor an end-of-sequence token; set `pad_token`.")
        if pad == getattr(processor, "image_token_id", None):
            raise ValueError(
                f"the padding token {tokenizer.convert_ids_to_tokens(pad)!r} (id {pad}) is the image token, so padding "
                "would count as pictures; set another `pad_token`."
            )
        self.fill = {"input_ids": pad, "labels": IGNORED}
        self.padding_side = padding_side

    def __call__(self, samples: Sequence[Encoded]) -> dict[str, Tensor]:
        """The batch: `input_ids`, `attention_mask`, `labels` [B, S] and the family's picture tensors."""
        names = {name for sample in samples for name in sample.sequence}
        length = max(sample.sequence["input_ids"].numel() for sample in samples)
        batch = {
            name: torch.stack([self._pad(sample.sequence, name, length) for sample in samples])
            for name in sorted(names)
        }
        for name in sorted({name for sample in samples for name in sample.media}):
            batch[name] = _join([sample.media[name] for sample in samples if name in sample.media])
        return batch

    def _pad(self, sequence: dict[str, Tensor], name: str, length: int) -> Tensor:
        fill = self.fill.get(name, 0)
        row = sequence.get(name)
        if row is None:  # token types that a processor gives only with pictures
            return torch.full((length,), fill)
        blank = row.new_full((length - row.numel(),), fill)
        return torch.cat([row, blank] if self.padding_side == "right" else [blank, row])


def _join(tensors: list[Tensor]) -> Tensor:
    """Join along the first dimension, the others filled up with zeros to the largest."""
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    return torch.cat([_fill(tensor, shape) for tensor in tensors])


def _fill(tensor: Tensor, shape: list[int]) -> Tensor:
    if list(tensor.shape[1:]) == shape:
        return tensor
    filled = tensor.new_zeros((tensor.shape[0], *shape))
    filled[(slice(None), *(slice(size) for size in tensor.shape[1:]))] = tensor
    return filled
