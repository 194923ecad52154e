"""One training forward under PRe: what is taken on the way, and the loss that comes of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from keepsight.pre.anchors import AnchorSource
from keepsight.pre.config import PReConfig
from keepsight.pre.controls import ControlAnchor
from keepsight.pre.external import PIXELS, POINTS
from keepsight.pre.head import Predictors
from keepsight.pre.inject import connect, connected, with_gradient_of
from keepsight.pre.objective import predictive_loss_sum
from keepsight.pre.sight import Observer, Seen
from keepsight.vlm.features import before_decoder
from keepsight.vlm.grids import ImageTokens
from keepsight.vlm.view import OfModel, Vlm, hidden_states_in, hidden_states_out, refuse_replica

ANCHOR = "anchor"  # the name of the target that is no layer


class ForwardPass(OfModel):
    """The hooks of PRe and what they leave behind.

    Args:
        layers: rising; shares: of the loss, one a layer.
        inject: let each layer's gradient enter at the layer.
        coefficient: what a loss summed over the pictures of the forward is multiplied with, when injected.

    Attributes:
        source: makes the anchor. targets: layer → name of what it predicts. widths: target → channels.
        loss_sum: of the latest training forward, summed over pictures; None before the first, and after a forward that
            trains nothing. seen: layer → what was seen in the latest training forward. images: its pictures.
        life: of the forwards since the last optimizer step, the latest that had pictures or pixels; None without one.
        in_step: training forwards since the last optimizer step; step: that step's number. Whoever counts sets them.
    """

    def __init__(
        self,
        vlm: Vlm,
        config: PReConfig,
        layers: list[int],
        shares: list[float],
        *,
        inject: bool,
        coefficient: Callable[[], float],
    ) -> None:
        self.vlm = vlm
        self.config = config
        self.layers = layers
        self.inject = inject
        self.source = AnchorSource(vlm, config)
        self.targets = {
            layer: f"h{below}" if config.cascade and below else ANCHOR
            for below, layer in zip((0, *layers), layers, strict=False)
        }
        self.widths = {
            name: self.source.width if name == ANCHOR else vlm.width for name in dict.fromkeys(self.targets.values())
        }
        self.observers = {layer: Observer() for layer in layers}
        self.loss_sum: Tensor | None = None
        self.seen: dict[int, Seen] = {}
        self.life: Seen | None = None
        self.images = self.step = self.in_step = 0
        self._shares = dict(zip(layers, shares, strict=True))
        self._coefficient = coefficient
        self._control = ControlAnchor(config.control, config.seed) if config.control else None
        self._extra: dict[str, Tensor] = {}
        self._predictors: Callable[[], Predictors]
        self._disarm()

    def hook(self, predictors: Callable[[], Predictors]) -> list[Any]:
        """Put the hooks on the model; `predictors` finds the submodule that holds the heads."""
        self._predictors = predictors
        vlm = self.vlm
        # Bound methods, so that a deep copy of the model carries hooks of its own.
        return [
            vlm.base.register_forward_pre_hook(self._take_extra, with_kwargs=True),
            vlm.core.register_forward_pre_hook(self._begin, with_kwargs=True),
            vlm.core.register_forward_hook(self._finish),
            vlm.layers[0].register_forward_pre_hook(self._take_inputs, with_kwargs=True),
            *(vlm.layers[layer - 1].register_forward_hook(partial(self._take_state, layer)) for layer in self.layers),
            *self.source.hooks,
        ]

    def memory(self) -> dict[str, Any]:
        """What the next forward may need of those before and no buffer holds; tensors, numbers and tuples only."""
        observers = {layer: observer.memory() for layer, observer in self.observers.items()}
        return {"observers": observers, "control": None if self._control is None else self._control.last}

    def remember(self, memory: dict[str, Any]) -> None:
        """Take back what `memory` gave."""
        for layer, observer in self.observers.items():
            observer.remember(memory["observers"].get(layer))
        if self._control is not None:
            self._control.last = memory["control"]

    def stepped(self) -> None:
        """An optimizer step is over."""
        self.step += 1
        self.in_step = 0
        self.life = None

    def clear(self) -> None:
        """Forget the latest forward."""
        self._disarm()
        self.loss_sum, self.life, self.seen, self._extra = None, None, {}, {}

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to one forward (tensors in an autograd graph) cannot be copied and need not be.
        transient = ("loss_sum", "life", "_tokens", "_index", "_batch", "_inputs", "_target")
        return {**self.__dict__, **dict.fromkeys(transient), "seen": {}, "_states": {}, "_extra": {}}

    def _disarm(self) -> None:
        # Layers that gradient checkpointing recomputes in the backward find the hooks disarmed.
        self._tokens: ImageTokens | None = None  # not None = armed
        self._index: Tensor | None = None
        self._batch: dict[str, Any] | None = None
        self._inputs: Tensor | None = None
        self._target: Tensor | None = None
        self._states: dict[int, Tensor] = {}

    def _take_extra(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._extra = {name: kwargs[name] for name in (PIXELS, POINTS) if name in kwargs}
        if self._extra:
            return args, {name: value for name, value in kwargs.items() if name not in self._extra}
        return None

    # Where the visual tokens lie is asked of the data, which takes a compiler that traces it longer than the model.
    @torch.compiler.disable
    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._disarm()
        self.loss_sum = None
        training = module.training and torch.is_grad_enabled()
        self._together = dist.is_available() and dist.is_initialized()
        self._blind = training and self._together and kwargs.get("pixel_values") is None
        if not (self.config.active and training):
            return
        refuse_replica(module)
        batch = self.vlm.bind(args, kwargs)
        mask = self.vlm.visual_mask(batch["input_ids"])
        self._tokens = self.vlm.image_tokens(batch)
        self._index = self._tokens.batch_row * mask.shape[1] + self._tokens.position
        self._batch = batch
        self._skipped = int((~mask.any(dim=1)).sum())
        self._had_pixels = batch.get("pixel_values") is not None
        self.images = self._tokens.n_images
        self.seen = {}

    def _gather(self, hidden: Tensor) -> Tensor:
        """The visual tokens: ``[B, S, d]`` → ``[T, d]``."""
        assert self._index is not None
        return hidden.flatten(0, 1).index_select(0, self._index.to(hidden.device))

    def _take_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = hidden_states_in(args, kwargs)
        if self._tokens is not None:
            self._inputs = self._gather(hidden.detach())  # stop-gradient
        if not (module.training and torch.is_grad_enabled() and isinstance(self.vlm.base, FSDPModule)):
            return None
        hidden = connected(hidden, self._zero_before_decoder())
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _take_state(self, layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._tokens is None:
            return None
        state = hidden_states_out(output)
        # Gathered later: an extra operation here could run inside a checkpointed region and not in its replay.
        self._states[layer] = state
        if not self.inject:
            return None
        loss = self._loss_of([layer])
        self.loss_sum = loss.detach() + (0.0 if self.loss_sum is None else self.loss_sum)
        state = with_gradient_of(state, loss * self._coefficient())
        return state if isinstance(output, torch.Tensor) else (state, *output[1:])

    def _finish(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._blind and not isinstance(self.vlm.base, FSDPModule):  # whose layers had it
            connect(output, self._zero_before_decoder())
        if self._tokens is None:
            return None
        if not self.inject:
            self.loss_sum = self._loss_of(self.layers)
            if self._together:
                connect(output, self.loss_sum)
        self.in_step += 1
        seen = Seen.mean(list(self.seen.values()))
        if seen.images or seen.had_pixels:
            self.life = seen
        self._disarm()
        self._extra = {}
        return output

    def _zero_before_decoder(self) -> Tensor:
        """A zero connected to what learns between pixels and decoder, with PRe or without.

        Processes reduce gradients together, and wait for ever for one that without a picture has none to send. Under
        DDP (where it does not look for unused parameters, as under gradient checkpointing) it is for the output of a
        forward without a picture. FSDP2's also gather each layer's weights together, so every process has it at every
        decoder's input.
        """
        parts = [parameter.sum().float() for _, parameter in before_decoder(self.vlm) if parameter.requires_grad]
        return 0.0 * torch.stack(parts).sum() if parts else torch.zeros(())

    @torch.compiler.disable
    def _loss_of(self, layers: list[int]) -> Tensor:
        """Loss of these layers by their shares, summed over the pictures of this forward."""
        missing = [layer for layer in layers if layer not in self._states]
        if missing:
            raise RuntimeError(
                f"the hook on decoder layer {missing[0]} was not called: if the model is compiled, attach before its "
                "first call, or call torch._dynamo.reset() after attaching."
            )
        states = {layer: self._gather(self._states[layer]) for layer in layers}  # [T, d]
        if self.config.observe:
            states = {layer: state.detach() for layer, state in states.items()}
        # One call of one module, because engines that shard parameters gather them around a module's call.
        predictions = self._predictors()({str(layer): state for layer, state in states.items()})
        losses = [
            self._shares[layer] * self._layer_loss(layer, predictions[str(layer)], state.requires_grad)
            for layer, state in states.items()
        ]
        return torch.stack(losses).sum()

    def _layer_loss(self, layer: int, prediction: Tensor, reaches_model: bool) -> Tensor:
        tokens = self._tokens
        assert tokens is not None
        target = self._target_of(layer).to(prediction.device)
        if tokens.n_images == 0:
            self.seen[layer] = self.observers[layer].nothing(self._skipped, self._had_pixels)
            # Connected to the head, so that every process of a distributed run has the same graph.
            return 0.0 * prediction.sum()
        self.seen[layer] = self.observers[layer].look(
            prediction.detach(), target, tokens, skipped=self._skipped, reaches_model=reaches_model
        )
        return predictive_loss_sum(
            prediction,
            target,
            tokens,
            granularity=self.config.granularity,
            distance=self.config.distance,
            temperature=self.config.temperature,
        )

    @torch.no_grad()
    def _target_of(self, layer: int) -> Tensor:
        """What the layer's head predicts, ``[T, d']``."""
        name = self.targets[layer]
        if name != ANCHOR:
            return self._normalised(name, self._gather(self._states[int(name[1:])].detach()))
        if self._target is None:
            tokens, inputs, batch = self._tokens, self._inputs, self._batch
            assert tokens is not None
            assert batch is not None
            if inputs is None:
                raise RuntimeError(
                    "the hook on decoder layer 0 was not called: if the model is compiled, attach before its first "
                    "call, or call torch._dynamo.reset() after attaching."
                )
            empty = tokens.n_images == 0
            anchor = self.source.empty(inputs.device) if empty else self.source(inputs, tokens, batch, self._extra)
            if self._control is not None:  # also without pictures: other processes may ask for theirs
                anchor = self._control(anchor, tokens, self.step, self.in_step)
            self._target = self._normalised(name, anchor)
        return self._target

    def _normalised(self, name: str, target: Tensor) -> Tensor:
        found = self._predictors().statistics_of(name)
        if found is None:
            return target
        found.collect(target)
        return found(target)
