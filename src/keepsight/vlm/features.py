"""What the vision encoder hands to the projector, on the grid of the visual tokens."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keepsight.vlm.grids import ImageTokens, resampled
from keepsight.vlm.newlines import NEWLINE_TILES, newline_tokens, packed
from keepsight.vlm.view import OfModel, Vlm

# Where families keep the module between encoder and decoder.
_PROJECTORS = ("multi_modal_projector", "multimodal_projector", "connector", "aligner", "embed_vision", "mm_projector")
_INSIDE_ENCODER = ("merger",)


def encoder_of(vlm: Vlm) -> nn.Module:
    """The vision encoder (with a patch merger inside it, in Qwen-VL and kin)."""
    return vlm.base.get_encoder(modality="image")


def projector_of(vlm: Vlm) -> nn.Module:
    """The module that takes the encoder's features to the decoder's width.

    Raises:
        ValueError: naming the family, when it is not found.
    """
    for owner, names in ((vlm.core, _PROJECTORS), (encoder_of(vlm), _INSIDE_ENCODER)):
        for name in names:
            found = getattr(owner, name, None)
            if isinstance(found, nn.Module):
                return found
    raise ValueError(
        f"model family {vlm.family!r}: no projector found among {list(_PROJECTORS)} of {type(vlm.core).__name__} or "
        f"{list(_INSIDE_ENCODER)} of its encoder; use an anchor that does not need it ('pre_llm')."
    )


class ProjectorInput(OfModel):
    """What the projector is given at each forward: the vision encoder's output.

    Attributes:
        hook: on the projector; `hook.remove()` takes it off.

    Raises:
        ValueError: when the family's projector is not found.
    """

    def __init__(self, vlm: Vlm) -> None:
        self.vlm = vlm
        self._given: Tensor | None = None
        self.hook = projector_of(vlm).register_forward_pre_hook(self._take, with_kwargs=True)

    def _take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else next(value for value in kwargs.values() if torch.is_tensor(value))
        self._given = given.detach()

    def on_tokens(self, tokens: ImageTokens, batch: dict[str, Any]) -> Tensor:
        """``[T, d_v]``: the latest forward's, averaged over the patches of each visual token (`on_token_grid`).

        Raises:
            ValueError: when patches and tokens do not fit.
            RuntimeError: when the hook was not called.
        """
        if self._given is None:
            raise RuntimeError(
                f"the hook on the projector ({type(projector_of(self.vlm)).__name__}) was not called: if the model is "
                "compiled, attach before its first call, or call torch._dynamo.reset() after attaching."
            )
        given, self._given = self._given, None
        return on_token_grid(self.vlm, given, tokens, batch)


def before_decoder(vlm: Vlm) -> Iterator[tuple[str, nn.Parameter]]:
    """The core's parameters between pixels and decoder (encoder, projector), by their names in the core."""
    decoder = {id(parameter) for parameter in vlm.decoder.parameters()}
    for name, parameter in vlm.core.named_parameters():
        aside = name.startswith("keepsight_head.") or ".original_module." in name  # of PEFT, which uses its copy
        if id(parameter) not in decoder and not aside:
            yield name, parameter


def plain_name(name: str) -> str:
    """A parameter's name as it was before PEFT wrapped its module."""
    return re.sub(r"\.(base_layer|modules_to_save\.[^.]+)(?=\.)", "", name)


def image_features(vlm: Vlm, batch: dict[str, Any]) -> Tensor:
    """``[T, d]``: the features that the model puts at its visual positions, in their order.

    Equal to ``h[0]`` at the visual positions, but for families that add something after the merge.
    """
    core: Any = vlm.core
    accepted = inspect.signature(core.get_image_features).parameters
    names = {*accepted, "image_sizes"} if "kwargs" in accepted else set(accepted)  # older releases take sizes as such
    known = {name: batch[name] for name in names if batch.get(name) is not None and name != "kwargs"}
    for name, parameter in accepted.items():
        if name == "vision_feature_select_strategy" and parameter.default is parameter.empty:  # Llama 4, of old
            known[name] = getattr(vlm.config.vision_config, name, "default")
    output = core.get_image_features(**known)
    features = getattr(output, "pooler_output", output)
    if features is None:  # Llama 4 projects only after this
        features = projector_of(vlm)(output.last_hidden_state)
    parts = list(features) if isinstance(features, (list, tuple)) else [features]
    found = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
    if vlm.family in NEWLINE_TILES:
        found = found[~torch.cat(newline_tokens(core, batch)).to(found.device)]
    return found


def on_token_grid(vlm: Vlm, features: Tensor, tokens: ImageTokens, batch: dict[str, Any]) -> Tensor:
    """The projector's input, averaged over the patches that the projector merges into one visual token.

    Args:
        features: as the projector gets them: ``[tiles, patches, d_v]``; ``[tiles, d_v, rows, columns]``; or
            ``[patches, d_v]``, with the patches of one token next to each other (Qwen-VL) or row by row (Mistral 3).
        tokens: the visual tokens of the batch.

    Returns:
        ``[T, d_v]`` in the order of `tokens`.

    Raises:
        ValueError: when patches and tokens do not fit.
    """
    if resampled(vlm.config):
        raise ValueError(
            f"model family {vlm.family!r}: its projector holds a resampler whose visual tokens stand for no patch, so "
            "patches have no token to be the anchor of; use the anchor 'pre_llm'."
        )
    if vlm.family in NEWLINE_TILES:
        return torch.cat(packed(vlm.core, features, batch))
    count, width = len(tokens.image), features.shape[-1]
    if features.dim() == 2 or batch.get("image_grid_thw") is not None:
        flat = features.reshape(-1, width)
        if len(flat) % count:
            raise _unfit(vlm, features, count)
        if batch.get("image_sizes") is not None:
            flat = flat[block_order([picture[0] for picture in tokens.grids], vlm.config.spatial_merge_size)]
        merged = flat.view(count, -1, width).mean(dim=1)
        order = _window_order(encoder_of(vlm), batch)
        return merged if order is None else merged[order.argsort()]
    if features.dim() == 4:
        features = features.flatten(2).transpose(1, 2)
        width = features.shape[-1]
    tiles, patches, _ = features.shape
    if count % tiles or patches % (count // tiles):
        raise _unfit(vlm, features, count)
    side, merge = round(patches**0.5), round((patches * tiles // count) ** 0.5)
    if merge > 1:
        if side * side != patches or merge * merge * count != patches * tiles:
            raise _unfit(vlm, features, count)
        square = features.transpose(1, 2).reshape(tiles, width, side, side)
        features = F.avg_pool2d(square, merge).flatten(2).transpose(1, 2)
    return features.reshape(count, width)


def block_order(grids: Iterable[tuple[int, int]], merge: int) -> Tensor:
    """Of patches that lie row by row, picture after picture, an order in which those of one token are neighbours.

    Args:
        grids: rows and columns of each picture's tokens. merge: patches a side that make a token.
    """
    found, start = [], 0
    for rows, columns in grids:
        size = rows * columns * merge**2
        places = torch.arange(start, start + size).view(rows, merge, columns, merge)
        found.append(places.transpose(1, 2).flatten())
        start += size
    return torch.cat(found)


def _window_order(encoder: Any, batch: dict[str, Any]) -> Tensor | None:
    """The order in which Qwen2.5-VL's encoder keeps its merged patches until its very end."""
    if not hasattr(encoder, "window_size"):
        return None
    if hasattr(encoder, "get_window_index"):
        return torch.as_tensor(encoder.get_window_index(batch["image_grid_thw"])[0])
    from transformers.vision_utils import get_vision_window_index

    index, _ = get_vision_window_index(
        batch["image_grid_thw"],
        spatial_merge_size=encoder.spatial_merge_size,
        window_size=encoder.window_size,
        patch_size=encoder.patch_size,
    )
    return index


def _unfit(vlm: Vlm, features: Tensor, count: int) -> ValueError:
    return ValueError(
        f"model family {vlm.family!r}: its projector takes features of shape {list(features.shape)}, which do not pool "
        f"to {count} visual tokens; use the anchor 'pre_llm'."
    )
