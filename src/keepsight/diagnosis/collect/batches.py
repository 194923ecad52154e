"""From pictures to batches: prompt, visual tokens, object membership, the spectrum's sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keepsight.diagnosis.collect.batch import Batch
from keepsight.diagnosis.collect.record import Seen
from keepsight.diagnosis.data.pictures import Picture
from keepsight.diagnosis.metrics.spectrum import GROUPS
from keepsight.diagnosis.metrics.structure import membership
from keepsight.images import ImageError, is_animated, refused
from keepsight.vlm import Vlm
from keepsight.vlm.chat import special_tokens
from keepsight.vlm.geometry import patch_coverage
from keepsight.vlm.grids import ImageTokens

SIDE = 1024  # rows and columns of a tile are fewer
DEFAULT_PROMPT = "Describe the picture."


def truncate(inputs: dict[str, Any], mask: Tensor) -> dict[str, Any]:
    """Cut every per-token input [B, S] after the last visual token: causal layers below it are unchanged by it."""
    end = int(mask.any(dim=0).nonzero().max()) + 1
    return {
        name: value[:, :end]
        if isinstance(value, Tensor) and value.ndim == 2 and value.shape == mask.shape and not value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


@dataclass(frozen=True)
class Decoded:
    """One batch, ready for the forward: the model's inputs, what is where, which pictures it holds; their tokens."""

    inputs: dict[str, Any]
    batch: Batch
    indices: list[int]
    tokens: ImageTokens


@dataclass
class Loader:
    """Decodes pictures in order, `batch_size` at a time.

    rate: share of each image's tokens that the sample takes; counted: share of the images whose patches' neighbours are
    counted; whole: keep the prompt after the picture, and pad on the left; broken: names of the pictures left out so
    far; mask_values: the values seen in masks so far.
    """

    vlm: Vlm
    processor: Any
    pictures: Sequence[Picture]
    prompt: str  # rendered
    batch_size: int
    seed: int
    split_components: bool = False
    skip_broken: bool = False
    rate: float = 0.0
    counted: float = 1.0
    whole: bool = False

    def __post_init__(self) -> None:
        self.seen = Seen()
        order = np.random.default_rng([self.seed, 4]).permutation(len(self.pictures))
        self._group = torch.from_numpy(order % GROUPS)

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def batches(self, indices: Sequence[int], masks: bool) -> Iterator[Decoded]:
        """The pictures with these indices; broken ones are left out when `skip_broken`.

        Raises:
            ImageError: a picture cannot be read and `skip_broken` is off.
        """
        for start in range(0, len(indices), self.batch_size):
            decoded, seen = self.load(indices[start : start + self.batch_size], masks)
            self.seen.update(seen)
            if decoded is not None:
                yield decoded

    def load(self, indices: Sequence[int], masks: bool) -> tuple[Decoded | None, Seen]:
        """One batch, None where all its pictures are broken, and what was met in it.

        Raises:
            ImageError: a picture cannot be read, or not be taken by the processor, and `skip_broken` is off.
        """
        seen, kept, images, arrays, classes = Seen(), [], [], [], []
        for index in indices:
            try:
                image, mask, known = self.pictures[index].read(self.split_components)
            except ImageError:
                if not self.skip_broken:
                    raise
                seen.broken[index] = self.pictures[index].name
                continue
            kept.append(index)
            images.append(image)
            arrays.append(mask if masks else None)
            classes.append(known)
            if is_animated(image):
                seen.animated.add(index)
            if masks and mask is not None:
                seen.mask_values.update(np.flatnonzero(np.bincount(mask.ravel())).tolist())
        try:
            inputs = self._process(images) if kept else {}
        except Exception:  # which kind, depends on the processor
            bad = [i for i, image in zip(kept, images, strict=True) if not self._takes(image, i)]
            if not bad:
                raise
            again, others = self.load([index for index in kept if index not in bad], masks)
            others.broken |= seen.broken | {index: self.pictures[index].name for index in bad}
            return again, others
        return (self._decode(inputs, kept, arrays, classes) if kept else None), seen

    def _takes(self, image: Any, index: int) -> bool:
        """Whether the processor takes this picture alone; if not and `skip_broken` is off, an ImageError."""
        try:
            self._process([image])
        except Exception as cause:
            if self.skip_broken:
                return False
            raise refused(image, self.pictures[index].name, cause) from cause
        return True

    def _process(self, images: list[Any]) -> dict[str, Any]:
        return dict(
            self.processor(
                images=[[image] for image in images],
                text=[self.prompt] * len(images),
                return_tensors="pt",
                padding=True,
                **({"padding_side": "left"} if self.whole else {}),
                **special_tokens(self.processor, self.prompt),
            )
        )

    def _decode(
        self,
        inputs: dict[str, Any],
        indices: list[int],
        masks: list[np.ndarray | None],
        classes: list[dict[int, str]],
    ) -> Decoded:
        tokens = self.vlm.image_tokens(inputs)
        if tokens.n_images != len(indices):
            raise ValueError(
                f"the processor made {tokens.n_images} pictures of {len(indices)}; the prompt {self.prompt[:60]!r} "
                "must hold one image placeholder, and pictures must not be cut into crops that count as pictures of "
                "their own: set do_pan_and_scan=False (Gemma 3) or do_image_splitting=False (Idefics2)"
            )
        counts = tokens.counts().tolist()
        objects, owner, kinds, offset = [], [], [], 0
        total = len(tokens.image)
        for number, (mask, count) in enumerate(zip(masks, counts, strict=True)):
            if mask is not None:
                ids, coverage = patch_coverage(self.processor, self.vlm, mask, self.prompt)
                if coverage.shape[1] != count:
                    raise ValueError(
                        f"the mask of '{self.pictures[indices[number]].name}' maps to {coverage.shape[1]} patches, but "
                        f"the picture has {count} visual tokens"
                    )
                part = torch.zeros(len(coverage), total, dtype=torch.bool)
                part[:, offset : offset + count] = membership(coverage)
                objects.append(part)
                owner += [number] * len(coverage)
                kinds += [classes[number].get(value, "") for value in ids]
            offset += count
        if not self.vlm.bidirectional_images and not self.whole:
            inputs = truncate(inputs, self.vlm.visual_mask(inputs["input_ids"]))
        batch = Batch(
            image=tokens.image,
            n_images=len(indices),
            thumbnail=tokens.thumbnail,
            objects=torch.cat(objects) if objects else torch.zeros(0, total, dtype=torch.bool),
            owner=torch.tensor(owner, dtype=torch.long),
            sample=self._sample(indices, counts),
            group=self._group[indices],
            counted=torch.tensor([np.random.default_rng([self.seed, 10, i]).random() < self.counted for i in indices]),
            classes=kinds,
            place=(tokens.tile * SIDE + tokens.row) * SIDE + tokens.column,
        )
        return Decoded(inputs, batch, indices, tokens)

    def _sample(self, indices: list[int], counts: list[int]) -> Tensor:
        """Which tokens the sample takes: each with the same probability, from a generator of the image's own."""
        chosen, offset = [], 0
        for index, count in zip(indices, counts, strict=True):
            generator = np.random.default_rng([self.seed, 3, index])
            size = min(count, int(self.rate * count + generator.random()))
            chosen.append(offset + np.sort(generator.choice(count, size, replace=False)))
            offset += count
        return torch.from_numpy(np.concatenate(chosen))
