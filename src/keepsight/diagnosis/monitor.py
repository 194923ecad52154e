"""A watch over any training, with or without PRe: is the middle layer still showing what came in? Ours.

Every so many steps one training forward is looked at: the visual tokens at the decoder's input and at one layer, both
projected to a few hundred dimensions by a fixed random matrix. A ridge regression from the layer to the input, fitted
on what was seen *before*, is scored on the new tokens; then they are taken in. So nothing is scored on what it was
fitted to, and nothing is kept that grows.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from keepsight.diagnosis.metrics.spectrum import participation_ratio
from keepsight.diagnosis.metrics.structure import Groups, structure
from keepsight.trainer_log import add_to_log, go_first
from keepsight.vlm.grids import ImageTokens
from keepsight.vlm.view import Vlm, hidden_states_in, hidden_states_out, refuse_replica

KEPT = 0.9  # share of the running sums that stays at each look: the model moves, and so do its tokens
RIDGE = 1e-2  # of the mean variance of the projected layer
ENOUGH = 4  # tokens a projected dimension before the first score
LOOKS = 3  # looks whose mean is compared with the first ones before a warning


class RunningRidge:
    """Ridge regression of y on x from running sums, float64; both [T, k]."""

    def __init__(self) -> None:
        self.count = 0.0
        self._sums: Tensor | None = None  # [1 + 2k, 1 + 2k], products of (1, x, y)

    def score(self, x: Tensor, y: Tensor) -> float | None:
        """R² = 1 − SSE / SST on these tokens by what was seen before, around the mean of before; None too early."""
        k = x.shape[1]
        if self._sums is None or self.count < ENOUGH * k:
            return None
        sums = self._sums / self._sums[0, 0]
        mean_x, mean_y = sums[0, 1 : 1 + k], sums[0, 1 + k :]
        xx = sums[1 : 1 + k, 1 : 1 + k] - mean_x[:, None] * mean_x
        xy = sums[1 : 1 + k, 1 + k :] - mean_x[:, None] * mean_y
        floor = RIDGE * xx.diagonal().mean() * torch.eye(k, dtype=xx.dtype, device=xx.device)
        weights = torch.linalg.solve(xx + floor, xy)
        centred = y.double() - mean_y
        error = centred - (x.double() - mean_x) @ weights
        return float(1 - error.square().sum() / centred.square().sum().clamp(min=1e-300))

    def update(self, x: Tensor, y: Tensor) -> None:
        """Take these tokens in and let older ones fade, but not so fast that few tokens a look are never enough."""
        rows = torch.cat([x.new_ones(len(x), 1), x, y], dim=1).double()
        products = rows.T @ rows
        if self._sums is not None:
            missing = (ENOUGH * x.shape[1] - len(x)) / self.count
            products += min(1.0, max(KEPT, missing)) * self._sums
        self._sums = products
        self.count = float(self._sums[0, 0])


class FidelityCallback(TrainerCallback):
    """Logs how much of the visual input a layer still holds, every `every` optimizer steps, from the training batches.

    For HF `Trainer` and its subclasses (TRL): ``callbacks=[FidelityCallback()]``. When training begins it goes before
    the trainer's other callbacks, so that trackers such as TensorBoard get its numbers too. With several processes the
    logged numbers are the first one's, of its own pictures.

    Logged with the trainer's next log: ``sight_fidelity`` (R² of the layer's prediction of the input, scored before it
    learns from the batch), ``sight_homogeneity`` and ``sight_homogeneity_input`` (mean cosine between the tokens of a
    picture), ``sight_dimension`` and ``sight_dimension_input`` (participation ratio of the projected tokens).

    Args:
        layer: index, "middle" or "last".
        every: optimizer steps between two looks.
        dimensions: of the random projection; at most the decoder's width.
        warn_drop: warn once when the mean fidelity of the last three looks lies this much below that of the first.
        seed: of the projection.

    Raises:
        ValueError: for a number out of range; at the start of training, for a model or layer that `Vlm` refuses; at the
            first look, for several GPUs in one process.

    Warns:
        UserWarning: once, when fidelity falls; at the end of a training in which no forward had a picture.
    """

    def __init__(
        self,
        layer: int | str = "middle",
        *,
        every: int = 50,
        dimensions: int = 256,
        warn_drop: float = 0.1,
        seed: int = 0,
    ) -> None:
        if every < 1 or dimensions < 1 or not warn_drop > 0:
            raise ValueError(
                f"every is {every}, dimensions {dimensions}, warn_drop {warn_drop}: allowed are 1 or more, 1 or more, "
                "and a number above 0."
            )
        self.layer = layer
        self.every = every
        self.dimensions = dimensions
        self.warn_drop = warn_drop
        self.seed = seed
        self.history: list[dict[str, float]] = []
        self._ridge = RunningRidge()
        self._pending: dict[str, float] = {}
        self._hooks: list[Any] = []
        self._wanted = self._warned = self._looked = False
        self._tokens: ImageTokens | None = None
        self._index: Tensor | None = None
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._projection: Tensor | None = None

    # ---- what the trainer calls ------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Put the hooks on, and go before the trackers, which read a log as it is when they get it."""
        self._take_off()  # those of a training that raised: Trainer tells its callbacks nothing of that
        go_first(self)
        self._wanted = self._looked = False
        self._vlm = Vlm(model)
        self._index_of_layer = self._vlm.resolve_layer(self.layer)
        if self._index_of_layer == 0:
            raise ValueError("layer is 0, the decoder's input itself: choose a layer from 1 on, 'middle' or 'last'.")
        self._hooks = [
            self._vlm.core.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._vlm.layers[0].register_forward_pre_hook(self._take_input, with_kwargs=True),
            self._vlm.layers[self._index_of_layer - 1].register_forward_hook(self._take_layer),
            self._vlm.core.register_forward_hook(self._finish),
        ]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the first forward with pictures of every so manyth step."""
        self._wanted = self._wanted or state.global_step % self.every == 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Put the latest numbers beside the trainer's."""
        if logs is not None and "loss" in logs and self._pending:
            add_to_log(logs, state, self._pending)
            self._pending = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks off."""
        self._take_off()
        if self._wanted and not self._looked:
            warnings.warn(
                f"FidelityCallback logged nothing: no training forward of {state.global_step} steps had a picture. Do "
                "the batches carry pixels and image tokens?",
                stacklevel=2,
            )

    def _take_off(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # ---- one look --------------------------------------------------------------------------------------------------

    # As in PRe's hooks: a compiler that traces what asks the data takes longer over it than over the model.
    @torch.compiler.disable
    def _begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._tokens = self._input = self._output = None
        if not (self._wanted and module.training and torch.is_grad_enabled()):
            return
        refuse_replica(module)
        batch = self._vlm.bind(args, kwargs)
        tokens = self._vlm.image_tokens(batch)
        if tokens.n_images:
            self._wanted, self._looked = False, True
            self._tokens = tokens
            self._index = tokens.batch_row * batch["input_ids"].shape[1] + tokens.position

    def _gather(self, hidden: Tensor) -> Tensor:
        assert self._index is not None
        return hidden.detach().flatten(0, 1).index_select(0, self._index.to(hidden.device)).float()

    def _take_input(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._tokens is not None:
            self._input = self._gather(hidden_states_in(args, kwargs))

    def _take_layer(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        if self._tokens is not None:  # looked at later: a look here would cut a compiled decoder into its layers
            self._output = hidden_states_out(output).detach()

    @torch.compiler.disable
    @torch.no_grad()
    def _finish(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        tokens, given, held = self._tokens, self._input, self._output
        self._tokens = self._input = self._output = None  # layers that checkpointing computes again find nothing to do
        if tokens is not None and given is not None and held is not None:
            with torch.autocast(given.device.type, enabled=False):  # bfloat16 would round cosines near 1 to 1/256
                self.look(given, self._gather(held), tokens)

    def look(self, given: Tensor, held: Tensor, tokens: ImageTokens) -> dict[str, float]:
        """Compare the visual tokens at the input and at the layer, both [T, d]; returns the numbers to log."""
        projection = self._project(given)
        x, y = held @ projection, given @ projection
        if x.device.type == "mps":  # Apple's GPUs lack float64
            x, y = x.cpu(), y.cpu()
        groups = Groups.build(tokens.image, tokens.n_images)
        numbers: dict[str, float] = {}
        score = self._ridge.score(x, y)
        self._ridge.update(x, y)
        if score is not None:
            numbers["sight_fidelity"] = score
        for name, states, projected in (("", held, x), ("_input", given, y)):
            numbers[f"sight_homogeneity{name}"] = float(structure(states, groups).homogeneity.nanmean())
            numbers[f"sight_dimension{name}"] = participation_ratio(torch.cov(projected.double().T, correction=0))
        self.history.append(numbers)
        self._pending = {name: value for name, value in numbers.items() if math.isfinite(value)}
        self._warn()
        return numbers

    def _project(self, states: Tensor) -> Tensor:
        if self._projection is None:
            width = states.shape[1]
            k = min(self.dimensions, width)
            generator = torch.Generator().manual_seed(self.seed)
            # Orthonormal columns: no direction counts twice.
            self._projection = torch.linalg.qr(torch.randn(width, k, generator=generator))[0].to(states)
        return self._projection

    def _warn(self) -> None:
        scores = [numbers["sight_fidelity"] for numbers in self.history if "sight_fidelity" in numbers]
        if self._warned or len(scores) < 2 * LOOKS:
            return
        first, last = sum(scores[:LOOKS]) / LOOKS, sum(scores[-LOOKS:]) / LOOKS
        if first - last > self.warn_drop:
            self._warned = True
            warnings.warn(
                f"layer {self._index_of_layer} is losing sight of the pictures: it predicted {first:.2f} of the visual "
                f"input's variance at first, now {last:.2f}. Diagnose a checkpoint (keepsight diagnose), or train with "
                "predictive regularization (keepsight.attach).",
                stacklevel=2,
            )
