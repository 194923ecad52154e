"""The encoder and projector as they were, or as they are on a slow average: anchors that training moves less."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from keepsight.pre.float32 import Float32Module
from keepsight.vlm.features import before_decoder, image_features, plain_name
from keepsight.vlm.view import Vlm


class Teacher(Float32Module):
    """Averages of the parameters that learn between pixels and decoder; those that do not learn are the model's own.

    Args:
        decay: share of the average that stays at each optimizer step; 1 = as it was when `hold` first saw it.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.names: list[str] = []

    def hold(self, vlm: Vlm) -> None:
        """Begin to hold, as they are now, the parameters that learn and are not held yet."""
        for name, (_, parameter) in _own(vlm).items():
            if parameter.requires_grad and name not in self.names:
                self.register_buffer(f"average_{len(self.names)}", parameter.detach().clone().float())
                self.names.append(name)

    def averages(self) -> dict[str, Tensor]:
        """Parameter name in the core, as before any wrapping → its float32 average."""
        return {name: self.get_buffer(f"average_{number}") for number, name in enumerate(self.names)}

    @torch.no_grad()
    def update(self, vlm: Vlm) -> None:
        """End of an optimizer step."""
        if self.decay == 1:
            return
        own = _own(vlm)
        for name, average in self.averages().items():
            average.lerp_(own[name][1].detach().float(), 1 - self.decay)

    @torch.no_grad()
    def image_features(self, vlm: Vlm, batch: dict[str, Any]) -> Tensor:
        """``[T, d]``, what the averaged weights put at the visual positions. Without dropout, because a target has no
        noise, and a model that is only observed must draw the random numbers of the bare one."""
        own = _own(vlm)
        weights = {f"core.{own[name][0]}": average.to(own[name][1].dtype) for name, average in self.averages().items()}
        decoder = set(vlm.decoder.modules())
        learning = [module for module in vlm.core.modules() if module.training and module not in decoder]
        for module in learning:
            module.training = False
        try:
            return functional_call(_Features(vlm), weights, (batch,))
        finally:
            for module in learning:
                module.training = True


def _own(vlm: Vlm) -> dict[str, tuple[str, nn.Parameter]]:
    """The model's parameters by their names before any wrapping, each with its present name."""
    return {plain_name(name): (name, parameter) for name, parameter in before_decoder(vlm)}


class _Features(nn.Module):
    """`image_features` as a module, for `functional_call`."""

    def __init__(self, vlm: Vlm) -> None:
        super().__init__()
        self.core = vlm.core
        self._vlm = [vlm]  # in a list, so that nothing of it is registered

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return image_features(self._vlm[0], batch)
