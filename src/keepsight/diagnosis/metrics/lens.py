"""Logit lens: what the language model would say at a visual token if a layer were the last. Ours: silencing.

`lm_head(final_norm(h[l]))` (nostalgebraist 2020), the norm applied exactly once: h[l] is captured before it at every
layer, the last included, where the lens is the model's own prediction. Visual tokens that all say the same few words,
whatever the picture, no longer say what they show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keepsight.diagnosis.collect.accumulate import BLOCK, Accumulator
from keepsight.results import Measurement, PerImageBuilder
from keepsight.results.intervals import Estimate, mean_interval, ratio_interval, ratio_shares
from keepsight.vlm import Vlm

LAYERS = 11  # that the lens looks at, of more evenly spread ones
TOKENS = 256  # of the sample that the lens takes: a large vocabulary costs as much as several layers
LISTED = 1600  # one token in so many of the vocabulary may be listed as frequent
SHOWN = 10  # listed tokens that a row names
CHUNK = 1 << 23  # logits at a time
CACHED = 1 << 18  # of them, that stay in a core's cache while their entropy is taken

Readout = Callable[[Tensor], Tensor]


class NoLensError(ValueError):
    """The model's logits cannot be had from its hidden states."""


def readout(vlm: Vlm, inputs: dict[str, Any]) -> Readout:
    """A function from hidden states [T, d] before the final norm to the model's logits [T, V].

    Norm and head are followed by what the family does to its logits (a soft cap, a scale); which it is, is found by
    comparing with the model's own logits of one batch, and nothing is assumed.

    Args:
        inputs: one batch, as the model takes it.

    Raises:
        NoLensError: the model has no LM head or final norm, or its logits are something else.
    """
    try:
        norm, head = vlm.final_norm, vlm.lm_head
    except (ValueError, AttributeError) as error:
        raise NoLensError(str(error)) from error
    before: list[Tensor] = []
    hook = norm.register_forward_pre_hook(lambda module, args: before.append(args[0][:, -1]))
    try:
        truth = vlm.base(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    finally:
        hook.remove()
    if not before:
        raise NoLensError(f"the final norm of {type(vlm.decoder).__name__} was not called before the LM head")
    dtype = next(head.parameters()).dtype
    largest = float(truth.abs().max())
    tolerance = (1e-3 if dtype is torch.float32 else 3e-2) * largest
    for change in _changes(vlm.decoder.config):

        def read(hidden: Tensor, change: Callable[[Tensor], Tensor] = change) -> Tensor:
            return change(head(norm(hidden.to(dtype))).float())

        if float((read(before[-1]) - truth).abs().max()) <= tolerance:
            return read
    raise NoLensError(
        f"model family {vlm.family!r}: its logits are not those of its LM head after the final norm, nor scaled or "
        "capped as its configuration says"
    )


def _changes(config: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """What families do to the head's output, by their configuration."""
    yield lambda logits: logits
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
        yield lambda logits: cap * torch.tanh(logits / cap)
    if factor := getattr(config, "logit_scale", None):  # Cohere
        yield lambda logits: logits * factor
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        yield lambda logits: logits / divisor


def top_and_entropy(hidden: Tensor, read: Readout) -> tuple[Tensor, Tensor, int]:
    """Most probable token [T], entropy of the distribution / log V [T], and V; hidden: [T, d]."""
    first = read(hidden[:1])
    size = first.shape[1]
    tops, entropies = [], []
    for part in hidden.split(max(1, CHUNK // size)):
        for logits in read(part).split(max(1, CACHED // size)):
            largest, top = logits.max(dim=1)
            shifted = logits - largest[:, None]
            shares = shifted.exp()
            total = shares.sum(dim=1)
            tops.append(top)
            # −Σ p log p with log p = shifted − log total, without forming it
            entropies.append((total.log() - torch.linalg.vecdot(shares, shifted) / total) / np.log(size))
    return torch.cat(tops), torch.cat(entropies), size


def top_tokens(hidden: Tensor, read: Readout) -> Tensor:
    """Most probable token [T] of hidden [T, d], without what its entropy would cost."""
    size = read(hidden[:1]).shape[1]
    return torch.cat([read(part).argmax(dim=1) for part in hidden.split(max(1, CHUNK // size))])


def silencing(top: np.ndarray, image: np.ndarray, listing: np.ndarray, k: int) -> tuple[Estimate, int, list[int]]:
    """Share of tokens whose top token is among the k most frequent ones, listed on some images, scored on others.

    Args:
        top, image: [n], top token and image of each visual token.
        listing: bool [n_images], the images that the list is made on.

    Returns:
        The share with its interval (a ratio over images), the number of images scored, and the list, most frequent
        first (ties: the lower id).
    """
    making = listing[image]
    ids, counts = np.unique(top[making], return_counts=True)
    listed = ids[np.lexsort((ids, -counts))][:k].tolist()
    owners, hits, tokens = listed_tokens(top, image, listing, listed)
    if not len(owners) or not listed:
        return Estimate(None, note="too few images to list tokens on one half and score the other"), len(owners), []
    return ratio_interval(hits, tokens), len(owners), listed


def listed_tokens(
    top: np.ndarray, image: np.ndarray, listing: np.ndarray, listed: list[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The images scored, how many tokens of each say a listed one, and how many it has."""
    scored = ~listing[image]
    owners, where = np.unique(image[scored], return_inverse=True)
    hits = np.bincount(where, np.isin(top[scored], listed), minlength=len(owners))
    return owners, hits, np.bincount(where, minlength=len(owners)).astype(float)


class Lens:
    """The lens at every layer, on a seeded part of the sample of tokens; on all where the sample is exact.

    Args:
        read: from `readout`, or the reason why there is none.
        decode: from a token's id to its text.
        middle_layer: a layer that is never left out.
        per_image: takes what each image adds to each number.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        read: Readout | str,
        decode: Callable[[int], str],
        seed: int,
        middle_layer: int,
        per_image: PerImageBuilder,
    ) -> None:
        self.accumulator = accumulator
        self.per_image = per_image
        self.read = read
        self.decode = decode
        self.seed = seed
        generator = np.random.default_rng([seed, 9])
        most = None if accumulator.exact else TOKENS
        self.chosen = np.sort(generator.permutation(accumulator.sampled.rows)[:most])
        self.image = accumulator.sample[0][self.chosen]
        last = len(accumulator.layers) - 1
        middle = [position for position, layer in enumerate(accumulator.layers) if layer == middle_layer]
        self.positions = {*middle, *(round(at) for at in np.linspace(0, last, min(LAYERS, last + 1)))}
        self.listing = generator.permutation(accumulator.pooled.rows) % 2 == 0

    def rows(self, position: int) -> list[Measurement]:
        """Silencing and entropy of the layer in this position, with and without its sinks; [] where it is left out."""
        if position not in self.positions:
            return []
        layer = self.accumulator.layers[position]
        if isinstance(self.read, str):
            base: dict[str, Any] = {"layer": layer, "seed": self.seed, "note": self.read}
            return [Measurement(name, None, **base) for name in ("silencing", "lens_entropy")]
        known = self.accumulator.calibration[layer]
        parts: list[tuple[np.ndarray, ...]] = []
        for start in range(0, len(self.chosen), BLOCK):
            rows = self.accumulator.sampled.gather(position, self.chosen[start : start + BLOCK])
            hidden = torch.from_numpy(rows).to(known.mean.device)
            first, evenness, size = top_and_entropy(hidden, self.read)
            ordinary = torch.linalg.vector_norm(hidden, dim=1) <= known.threshold
            parts.append((first.cpu().numpy(), evenness.double().cpu().numpy(), ordinary.cpu().numpy()))
        top, entropy, kept = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        found = self._rows(top, entropy, self.image, size, layer, "all")
        if not kept.all():
            top, entropy = top[kept], entropy[kept]
        return found + self._rows(top, entropy, self.image[kept], size, layer, "without sinks")

    def _rows(
        self, top: np.ndarray, entropy: np.ndarray, image: np.ndarray, size: int, layer: int, tokens: str
    ) -> list[Measurement]:
        k = max(1, round(size / LISTED))
        share, scored, listed = silencing(top, image, self.listing, k)
        shown = []
        for token in listed[:SHOWN]:
            part = float((top[~self.listing[image]] == token).mean())
            shown.append(f"{self.decode(token)!r} {100 * part:.0f} %")
        said = f"{len(top)} tokens; {k} of {size} listed" + (f", most frequent: {', '.join(shown)}" if shown else "")
        owners, where = np.unique(image, return_inverse=True)
        means = np.bincount(where, entropy) / np.bincount(where)
        common: dict[str, Any] = {"layer": layer, "seed": self.seed, "tokens": tokens}
        note = "; ".join(filter(None, [share.note, said]))
        silent = Measurement("silencing", **share.fields, n=scored, note=note, **common)
        spread = Measurement(
            "lens_entropy", **mean_interval(means).fields, n=len(owners), note=f"{len(top)} tokens", **common
        )
        if silent.value is not None:
            images, hits, counts = listed_tokens(top, image, self.listing, listed)
            self.per_image.add(silent.key, ratio_shares(hits, counts), images)
        self.per_image.add(spread.key, means, owners)
        return [silent, spread]
