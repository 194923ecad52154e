"""One view of every image-text-to-text model: its decoder layers and the positions that hold image features."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from keepsight.vlm.grids import BIDIRECTIONAL_IMAGES, ImageTokens, image_tokens
from keepsight.vlm.newlines import NEWLINE_TILES

# Families whose image features never enter the decoder's token sequence.
_OUT_OF_SCOPE = {
    "mllama": "its image features reach the decoder by cross-attention, so it has no visual tokens to follow",
    "florence2": "its visual tokens go to the BART encoder, not to the decoder",
}


def unwrap(model: Any) -> Any:
    """The transformers model inside the wrappers of DDP, `torch.compile` and PEFT."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


class Vlm:
    """What the rest of the package needs to know of a model, whatever its family.

    Layer indices follow one convention: ``h[0]`` is the decoder's input after the image features are merged in,
    ``h[l]`` the residual stream after decoder layer ``l`` (before the final norm), ``l = 1 … depth``.

    Args:
        model: a transformers image-text-to-text model, bare or wrapped by PEFT, DDP or `torch.compile`.

    Attributes:
        model: the model as given.
        core: the module that merges images and text and runs the decoder (no LM head); hooks live here because
            PEFT and DDP call it whatever they wrap.
        decoder: the language model; ``layers``: its decoder layers (`nn.ModuleList`, length ``depth``).
        depth: number of decoder layers L.
        width: hidden size d of the decoder.
        image_token_id: the placeholder's id in ``input_ids``.
        family: ``config.model_type``.
        bidirectional_images: whether image tokens attend to later tokens, so that a forward may not stop at the
            last image token.

    Raises:
        ValueError: naming the family and what is missing, when the model has no image token, no decoder layers, or
            feeds its image features elsewhere than into the decoder's sequence.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        base = unwrap(model)
        config: Any = getattr(base, "config", None)
        self.family: str = getattr(config, "model_type", type(base).__name__)
        if self.family in _OUT_OF_SCOPE:
            raise ValueError(f"model family {self.family!r} is not supported: {_OUT_OF_SCOPE[self.family]}.")
        image_token_id = getattr(config, "image_token_id", None)
        if image_token_id is None:
            raise ValueError(
                f"model family {self.family!r} has no image tokens: its config defines neither 'image_token_id' nor "
                "'image_token_index'. keepsight needs a model that AutoModelForImageTextToText can load."
            )
        self.image_token_id = int(image_token_id)
        self.config: Any = config
        self.core: nn.Module = base.base_model
        self.decoder: Any = _decoder(base, self.family)
        self.layers: nn.ModuleList = self.decoder.layers
        self.depth = len(self.layers)
        self.width = int(self.decoder.config.hidden_size)
        self.bidirectional_images = self.family in BIDIRECTIONAL_IMAGES
        self._signature = inspect.signature(self.core.forward)
        if "input_ids" not in self._signature.parameters:
            raise ValueError(
                f"model family {self.family!r}: {type(self.core).__name__}.forward takes no 'input_ids', so the visual "
                "positions cannot be found."
            )

    @property
    def base(self) -> Any:
        """The transformers model inside the wrappers."""
        return unwrap(self.model)

    @property
    def final_norm(self) -> nn.Module:
        """The norm between the last decoder layer and the LM head."""
        return self.decoder.norm

    @property
    def lm_head(self) -> nn.Module:
        """The output embedding.

        Raises:
            ValueError: for a base model that has none.
        """
        head = self.base.get_output_embeddings()
        if head is None:
            raise ValueError(
                f"{type(self.base).__name__} has no LM head; load the model with AutoModelForImageTextToText."
            )
        return head

    def resolve_layer(self, layer: int | str) -> int:
        """Layer index in 0…depth for a number, "middle" (depth // 2) or "last" (depth).

        Raises:
            ValueError: for a layer that does not exist.
        """
        names = {"middle": self.depth // 2, "last": self.depth}
        if isinstance(layer, str) and layer in names:
            return names[layer]
        if isinstance(layer, str) and layer.lstrip("-").isdigit():  # from a command line
            layer = int(layer)
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= self.depth:
            raise ValueError(
                f"layer {layer!r} does not exist in this {self.family!r} model: allowed are 0 to {self.depth} "
                f"(0 = the decoder's input), 'middle' (= {self.depth // 2}) and 'last' (= {self.depth})."
            )
        return layer

    def visual_mask(self, input_ids: Tensor) -> Tensor:
        """``[B, S]`` bool: the placeholders, which hold image features or learned newline tokens between them."""
        return input_ids == self.image_token_id

    def visual_index(self, batch: dict[str, Any]) -> Tensor:
        """``[T]``: the visual tokens' positions in the flattened ``[B · S]`` sequence, newline tokens left out."""
        if self.family in NEWLINE_TILES:
            tokens = self.image_tokens(batch)
            return tokens.batch_row * batch["input_ids"].shape[1] + tokens.position
        return self.visual_mask(batch["input_ids"]).flatten().nonzero(as_tuple=True)[0]

    def image_tokens(self, batch: dict[str, Any]) -> ImageTokens:
        """Which image, tile, row and column each visual token of a processor's batch belongs to.

        Learned newline tokens after rows of patches (LLaVA-NeXT, LLaVA-OneVision) stand for no patch: left out.
        """
        return image_tokens(self.config, self.visual_mask(batch["input_ids"]), batch, self.core)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call of ``core`` by name, with a clear error when there are no ids to find images in."""
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        extra = bound.pop("kwargs", {})
        batch = {**bound, **extra}
        if batch.get("input_ids") is None:
            raise ValueError(
                "the model was called without 'input_ids' (with 'inputs_embeds' only?), so the visual positions are "
                "unknown. Pass input_ids and pixel values and let the model merge them."
            )
        return batch

    def forward_core(self, **batch: Any) -> Any:
        """Forward through encoder, projector and decoder: no LM head, no cache. Labels are ignored."""
        batch.pop("labels", None)
        return self.core(**batch, use_cache=False)

    def __repr__(self) -> str:
        return f"Vlm(family={self.family!r}, depth={self.depth}, width={self.width})"


class OfModel:
    """Something with hooks on a model, copied together with it.

    A copy of a part of the model keeps to this one: PEFT makes one of each module that it is to save, which would carry
    along everything that its hooks lead to, the whole model among it.
    """

    vlm: Vlm

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if not {id(self.vlm.base), id(self.vlm.core)} & memo.keys():  # the base's own hooks come before its core
            return self
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        state: Any = copy.deepcopy(self.__getstate__(), memo)
        made.__setstate__(state)
        return made

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def refuse_replica(module: nn.Module) -> None:
    """At the forward, refuse one of the copies that `nn.DataParallel` runs side by side.

    `Trainer` uses it, without being asked, where one process sees several GPUs. Its copies share one set of hooks, so
    that they would take each other's states.

    Raises:
        ValueError: for such a copy.
    """
    if getattr(module, "_is_replica", False):
        raise ValueError(
            "the model runs under nn.DataParallel: one process, several GPUs, and hooks that see all of them at once. "
            "Start one process for each GPU (torchrun --nproc_per_node), or let the process see one "
            "(CUDA_VISIBLE_DEVICES=0)."
        )


def _decoder(base: Any, family: str) -> Any:
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    if not hasattr(decoder, "layers") and hasattr(decoder, "model"):
        decoder = decoder.model  # one wrapper more, as in Llama4
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise ValueError(
            f"model family {family!r}: its decoder {type(decoder).__name__} has no 'layers' (an nn.ModuleList of "
            "decoder layers), so there is no residual stream to follow."
        )
    return decoder


def hidden_states_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The residual stream among the arguments of a decoder layer, ``[B, S, d]``."""
    return args[0] if args else kwargs["hidden_states"]


def hidden_states_out(output: Any) -> Tensor:
    """The residual stream in a decoder layer's output (a tensor, or the first entry of a tuple), ``[B, S, d]``."""
    return output if isinstance(output, torch.Tensor) else output[0]
