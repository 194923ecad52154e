"""What PRe adds to a model: the prediction heads, and what they must remember between steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from keepsight.pre.config import PReConfig
from keepsight.pre.float32 import Float32Module
from keepsight.pre.normalise import AnchorStatistics
from keepsight.pre.teacher import Teacher


class Float32Linear(nn.Linear):
    """Computes in float32 whatever its weights are kept in: DeepSpeed's bf16 rounds all weights of a model, past
    `Float32Module`, and has the float32 ones itself. In the layer's own call, around which ZeRO-3 gathers them."""

    def forward(self, input: Tensor) -> Tensor:
        """``[T, d]`` → ``[T, d']``, both float32."""
        return F.linear(input, self.weight.float(), self.bias.float())


class PredictionHead(Float32Module):
    """Two-layer MLP ``f_pred``: Linear → GELU → Linear, no norm (paper: "2-layer MLP head"; GELU and width are ours).

    Its parameters stay float32 whatever the model around it is cast to (but by DeepSpeed, see `Float32Linear`), and it
    computes in float32 under autocast: the cosine it is trained on saturates near 1, where half precision cannot tell
    predictions apart.

    Args:
        width: d of the states read, ``[T, d]``.
        out_width: d' of the anchor, ``[T, d']``.
        hidden: width between the two layers.
        seed: of the generator that draws the weights (U(±1/√fan_in), as `nn.Linear`); the global one is not used.
    """

    def __init__(self, width: int, out_width: int, hidden: int, *, seed: int) -> None:
        super().__init__()
        # Built on "meta" and filled by hand, so that the global random generator is not advanced.
        self.up = Float32Linear(width, hidden, device="meta", dtype=torch.float32)
        self.act = nn.GELU()
        self.down = Float32Linear(hidden, out_width, device="meta", dtype=torch.float32)
        self.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(seed)
        for linear in (self.up, self.down):
            bound = 1 / math.sqrt(linear.in_features)
            for parameter in (linear.weight, linear.bias):
                with torch.no_grad():
                    parameter.uniform_(-bound, bound, generator=generator)

    def forward(self, states: Tensor) -> Tensor:
        """``[T, d]`` of any float type → ``[T, d']`` float32."""
        with torch.autocast(states.device.type, enabled=False):
            return self.down(self.act(self.up(states.float())))


class Predictors(Float32Module):
    """The submodule that a model with PRe carries: a head for each layer, and buffers that checkpoints must hold.

    Args:
        widths: target → its channels d'.
        targets: layer → the target that its head predicts.
        width: d of the states.
        config: for the heads' hidden width and seed, and the normalisation.

    Attributes:
        heads: layer (as text) → `PredictionHead`. statistics: target → `AnchorStatistics`.
        teacher: the averaged weights of a moving-average or frozen anchor, or None.
        steps: optimizer steps taken with PRe attached, scalar.
    """

    steps: Tensor

    def __init__(self, widths: Mapping[str, int], targets: Mapping[int, str], width: int, config: PReConfig) -> None:
        super().__init__()
        hidden = config.hidden or width
        self.heads = nn.ModuleDict(
            {
                str(layer): PredictionHead(width, widths[target], hidden, seed=config.seed + number)
                for number, (layer, target) in enumerate(targets.items())
            }
        )
        whiten = config.normalise == "whitened"
        self.statistics = nn.ModuleDict(
            {name: AnchorStatistics(d, whiten=whiten) for name, d in widths.items() if config.normalise != "none"}
        )
        self.teacher: Teacher | None = None
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Layer (as text: DeepSpeed reads the keys) → ``[T, d]`` states, to layer → ``[T, d']`` predictions."""
        return {layer: self.heads[layer](state) for layer, state in states.items()}

    def statistics_of(self, target: str) -> AnchorStatistics | None:
        """The running statistics of a target, if it is normalised."""
        return cast(AnchorStatistics | None, dict(self.statistics.items()).get(target))

    def commit_statistics(self) -> None:
        """End of an optimizer step."""
        for name in self.statistics:
            found = self.statistics_of(name)
            assert found is not None
            found.commit()
