"""Visual tokens pruned after a layer, in any model: what acceleration methods do, to measure what it costs.

Ranked by attention it is FastV's rule (Chen et al. 2024): after layer k, the visual tokens that the last token of the
prompt attends to least in layer k are dropped. Here they are hidden from every later layer instead, which gives all
other tokens exactly the states they would have without them (positions stay as they were), and works in every family
that takes its attention from transformers' registry. Nothing gets faster: this is for measuring.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from keepsight.vlm.view import Vlm

Ranking = Literal["attention", "random", "uniform"]
_NAME = "keepsight_pruned"


@dataclass(frozen=True)
class Pruning:
    """What is kept.

    Attributes:
        layer: k, the visual tokens are dropped after layer k; 0 = before the first, where nothing can be ranked.
        keep: share of the visual tokens of each sample that stays, rounded up; 1 keeps all.
        by: "attention" of the prompt's last token in layer k, mean over heads; "random" (one seeded draw for every
            sample with as many tokens, so that it does not depend on the batch); "uniform", evenly spaced in order.
        seed: of "random".

    Raises:
        ValueError: for settings that mean nothing.
    """

    layer: int
    keep: float
    by: Ranking = "attention"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.by not in get_args(Ranking):
            raise ValueError(f"by is {self.by!r}; allowed: {', '.join(map(repr, get_args(Ranking)))}.")
        if not 0 <= self.keep <= 1:
            raise ValueError(f"keep is {self.keep}; allowed: a share of the visual tokens, 0 to 1.")
        if self.layer < 0 or (self.layer == 0 and self.by == "attention"):
            raise ValueError(
                f"layer is {self.layer}; allowed: 1 or more with by='attention', which ranks by the attention of that "
                "layer, 0 or more otherwise."
            )

    def __str__(self) -> str:
        return f"{self.by}, {100 * self.keep:.6g}% after layer {self.layer}"


class Pruned:
    """What a forward under `pruned` kept.

    visual: bool [B, S] of the last prompt; hidden: bool [B, S], those that were dropped.
    """

    def __init__(self, vlm: Vlm, pruning: Pruning) -> None:
        self.vlm, self.pruning = vlm, pruning
        self.visual: Tensor | None = None
        self.hidden: Tensor | None = None
        self.place = {id(layer.self_attn): index for index, layer in enumerate(vlm.layers)}

    def _prompt(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A new prompt; one token at a time is an answer being written, whose prompt stays."""
        batch = self.vlm.bind(args, kwargs)
        if batch["input_ids"].shape[1] > 1:
            self.visual = self.vlm.visual_mask(batch["input_ids"])
            self.hidden = self._choose(None) if self.pruning.by != "attention" else None

    def _choose(self, attention: Tensor | None) -> Tensor:
        """bool [B, S] from the attention [B, S] that each token gets, or None."""
        assert self.visual is not None
        hidden = torch.zeros_like(self.visual)
        for row, visual in enumerate(self.visual):
            places = visual.nonzero()[:, 0]
            n, kept = len(places), math.ceil(self.pruning.keep * len(places) - 1e-9)
            if attention is not None:
                order = attention[row, places].argsort(descending=True, stable=True)
            elif self.pruning.by == "random":
                order = torch.randperm(n, generator=torch.Generator().manual_seed(self.pruning.seed)).to(places.device)
            else:
                even = ((torch.arange(kept) + 0.5) * n / max(kept, 1)).long()
                order = torch.cat([even, torch.arange(n)[~torch.isin(torch.arange(n), even)]]).to(places.device)
            hidden[row, places[order[kept:]]] = True
        return hidden

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Attention with the dropped tokens hidden; query [B, H, Q, c], key and value [B, H', K, c]."""
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if attention_mask is not None:
            scores = scores + attention_mask[..., : key.shape[2]]
        index = self.place.get(id(module))
        if index is not None and index >= self.pruning.layer and self.hidden is not None:
            length = self.hidden.shape[1]
            if key.shape[2] < length:
                raise ValueError(
                    f"a layer of this {self.vlm.family!r} model keeps {key.shape[2]} of {length} tokens (a sliding "
                    "window), so visual tokens cannot be followed there; pruning is not measured on it"
                )
            scores[..., :length] = scores[..., :length].masked_fill(
                self.hidden[:, None, None, :].to(scores.device), torch.finfo(scores.dtype).min
            )
        weights = scores.softmax(dim=-1, dtype=torch.float32)
        if index == self.pruning.layer - 1 and query.shape[2] > 1 and self.pruning.by == "attention":
            assert self.visual is not None
            # The last token of every prompt: batches are padded on the left.
            self.hidden = self._choose(weights[:, :, -1].mean(dim=1).to(self.visual.device))
        weights = nn.functional.dropout(weights.to(query.dtype), dropout, module.training)
        return (weights @ value).transpose(1, 2).contiguous(), weights


@contextmanager
def pruned(vlm: Vlm, pruning: Pruning) -> Iterator[Pruned]:
    """Inside, every forward (and `generate`) of the model loses visual tokens after a layer.

    Batches must be padded on the left, as for generation.

    Raises:
        ValueError: the model has no such layer, or its attention is not taken from transformers' registry.
    """
    vlm.resolve_layer(pruning.layer)
    if pruning.layer == vlm.depth:
        raise ValueError(f"layer is {pruning.layer}, the last one: nothing comes after it; allowed: below {vlm.depth}.")
    attentions = [getattr(layer, "self_attn", None) for layer in vlm.layers]
    configs = {id(c): c for a in attentions if (c := getattr(a, "config", None)) is not None}
    if None in attentions or not configs or not all(hasattr(c, "_attn_implementation") for c in configs.values()):
        raise ValueError(
            f"the attention of this {vlm.family!r} model is not taken from transformers' registry (layer.self_attn "
            "with a config), so nothing can be hidden from it"
        )
    configs[id(vlm.decoder.config)] = vlm.decoder.config  # it decides about the mask
    state = Pruned(vlm, pruning)
    before = {key: config._attn_implementation for key, config in configs.items()}
    AttentionInterface.register(_NAME, state._attend)
    AttentionMaskInterface.register(_NAME, eager_mask)
    hook = vlm.core.register_forward_pre_hook(state._prompt, with_kwargs=True)
    try:
        for config in configs.values():
            config._attn_implementation = _NAME
        yield state
    finally:
        hook.remove()
        for key, config in configs.items():
            config._attn_implementation = before[key]
