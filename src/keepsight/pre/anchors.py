"""What the heads predict: one anchor per forward, `[T, d']`, without gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from keepsight.pre.config import PReConfig
from keepsight.pre.external import PIXELS, POINTS, ExternalEncoder
from keepsight.pre.teacher import Teacher
from keepsight.vlm.features import ProjectorInput
from keepsight.vlm.grids import ImageTokens
from keepsight.vlm.view import Vlm


class AnchorSource:
    """Makes the anchor that the configuration asks for.

    Attributes:
        width: d' of the anchor.
        teacher: averaged weights, where the anchor needs them; they belong into the model's checkpoint.
        hooks: the hooks it put on the model.
    """

    def __init__(self, vlm: Vlm, config: PReConfig) -> None:
        self.vlm = vlm
        self.kind = config.anchor
        self.width = vlm.width
        self.teacher: Teacher | None = None
        self.external: ExternalEncoder | None = None
        self.hooks: list[Any] = []
        self._projector_input: ProjectorInput | None = None
        self._decay: float | None = None
        if not config.active:
            return
        if self.kind in ("pre_projector", "encoder"):
            self.width = _encoder_width(vlm)
            self._projector_input = ProjectorInput(vlm)
            self.hooks.append(self._projector_input.hook)
        self._decay = {"moving_average": config.anchor_decay, "encoder": 1.0}.get(self.kind)
        self.follow()
        if self.kind == "external":
            assert config.anchor_model is not None
            self.external = ExternalEncoder(config.anchor_model, config.anchor_layer)
            self.width = self.external.width

    def follow(self) -> Teacher | None:
        """Hold what learns now and is not held yet; returns `teacher`, None where the anchor needs none."""
        if self._decay is not None:
            teacher = self.teacher or Teacher(self._decay)
            teacher.hold(self.vlm)
            self.teacher = teacher if teacher.names or self.kind == "moving_average" else None
        return self.teacher

    def empty(self, device: torch.device) -> Tensor:
        """The anchor of no tokens."""
        return torch.zeros(0, self.width, device=device)

    def __call__(self, inputs: Tensor, tokens: ImageTokens, batch: dict[str, Any], extra: dict[str, Tensor]) -> Tensor:
        """The anchor of the present forward, ``[T, d']``, detached.

        Args:
            inputs: ``[T, d]``, the visual tokens at the decoder's input.
            batch: the arguments of the forward. extra: what `prepare` put into it.

        Raises:
            ValueError: when the external anchor's pixels are missing, or features do not fit the visual tokens.
        """
        if self.kind == "pre_llm":
            anchor = inputs
        elif self.kind == "external":
            assert self.external is not None
            if PIXELS not in extra:
                raise ValueError(
                    f"the anchor {self.external.name!r} needs the pictures themselves: add "
                    "`batch |= handle.prepare(images, processor)` before the forward, or let `keepsight train` do it."
                )
            device = inputs.device
            counts = tokens.counts().tolist()
            anchor = self.external.features(extra[PIXELS].to(device), extra[POINTS].to(device), counts)
        elif self.kind == "moving_average":
            assert self.teacher is not None
            anchor = self.teacher.image_features(self.vlm, batch)
        else:
            if self.teacher is not None:
                self.teacher.image_features(self.vlm, batch)  # on its way the projector's input is taken
            assert self._projector_input is not None
            anchor = self._projector_input.on_tokens(tokens, batch)
        if anchor.shape != (len(tokens.image), self.width):
            raise ValueError(
                f"anchor {self.kind!r} of model family {self.vlm.family!r} has shape {list(anchor.shape)}, expected "
                f"[{len(tokens.image)}, {self.width}]: one vector for each visual token; use the anchor 'pre_llm'."
            )
        return anchor.detach()


def _encoder_width(vlm: Vlm) -> int:
    """Channels of the projector's input."""
    vision = vlm.config.vision_config
    # Names differ where the encoder ends in a layer of another width. Qwen2-VL's `hidden_size` is what comes out of the
    # merger; of the others, it is not what goes into the merger or projector.
    own = {
        "qwen2_vl": "embed_dim",
        "glm4v": "out_hidden_size",
        "glm4v_moe": "out_hidden_size",
        "got_ocr2": "output_channels",
        "llama4": "vision_output_dim",
    }
    width = int(getattr(vision, own.get(vlm.family, "hidden_size")))
    chosen = getattr(vlm.config, "vision_feature_layers", None) or getattr(vlm.config, "vision_feature_layer", None)
    if isinstance(chosen, (list, tuple)):  # their features stand side by side
        width *= len(chosen)
    if hasattr(vlm.config, "downsample_ratio"):  # InternVL shuffles pixels into channels before its projector
        width *= round(1 / vlm.config.downsample_ratio) ** 2
    return width
