"""Attach Predictive Regularization to any model, and take it off again."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback

from keepsight.pre.config import PReConfig
from keepsight.pre.forward import ForwardPass
from keepsight.pre.head import PredictionHead, Predictors
from keepsight.pre.life import DeadLossError, assert_alive, of_deepspeed
from keepsight.pre.sight import Seen, Sight
from keepsight.vlm.view import Vlm, unwrap

HEAD = "keepsight_head"  # the submodule's name, hence a part of parameter names in checkpoints
_HANDLE = "_keepsight_handle"


class Handle(TrainerCallback):
    """Predictive Regularization at work on one model; made by `attach`.

    After every training forward, `loss` is ``λ · L_PRe`` of that forward, in the autograd graph. Under ``eval()``,
    ``no_grad`` and ``generate`` nothing is computed and `loss` is zero. As a `TrainerCallback` it checks once, before
    the first optimizer step that saw pictures, that the loss is alive (`assert_alive`).

    Attributes:
        config: as given. ``layers``: the resolved layer indices, rising; ``layer``: the highest.
        predictors: heads and running statistics, a submodule of the model, so that optimizers, checkpoints and DDP see
            it. ``head``: the `PredictionHead` of ``layer``.
        images_in_step: the number of pictures over which L_PRe is a mean. None = the pictures of the forward. With
            gradient accumulation or several processes, set it to the pictures of the whole step (`count_images`) to
            get the mean over the global batch, and do not divide the loss again.
        accumulation: with ``inject=True``, micro-batches in an optimizer step; `Trainer` sets it through the callback.
    """

    def __init__(self, model: nn.Module, config: PReConfig, *, inject: bool = False) -> None:
        self.vlm = Vlm(model)
        self.config = config
        self.inject = inject
        self.layers, shares = _resolve(self.vlm, config)
        self.layer = self.layers[-1]
        core = self.vlm.core
        if getattr(core, _HANDLE, None) is not None:
            raise ValueError(
                "predictive regularization is attached to this model already; call detach() on the first handle "
                "(keepsight.handle_of(model)) before attaching again."
            )
        self.images_in_step: int | None = None
        self.accumulation = 1
        self._forward = ForwardPass(
            self.vlm, config, self.layers, shares, inject=inject, coefficient=self._injected_coefficient
        )
        predictors = Predictors(self._forward.widths, self._forward.targets, self.vlm.width, config)
        predictors.teacher = self._forward.source.teacher
        predictors.requires_grad_(config.active)
        predictors.to(next(self.vlm.layers[self.layer - 1].parameters()).device)
        core.add_module(HEAD, predictors)
        setattr(core, _HANDLE, self)
        self._alive = not config.active
        predictors.register_load_state_dict_post_hook(self._restore_steps)
        self._hooks = self._forward.hook(self._find_predictors)
        _LIVE.add(self)

    # ---- what a training loop reads --------------------------------------------------------------------------------

    @property
    def predictors(self) -> Predictors:
        """The submodule that PRe added to the model."""
        return self._find_predictors()

    def _find_predictors(self) -> Predictors:
        module: Any = getattr(self.vlm.core, HEAD)
        if hasattr(module, "modules_to_save"):  # PEFT trains and saves a copy
            module = module.modules_to_save[module.active_adapters[0]]
        return module

    @property
    def head(self) -> PredictionHead:
        """The head of `layer`."""
        return cast(PredictionHead, self.predictors.heads[str(self.layer)])

    @property
    def steps(self) -> int:
        """Optimizer steps taken with PRe attached, those of a resumed run included."""
        return self._forward.step

    def _restore_steps(self, predictors: Any, *_: Any) -> None:
        # A number of our own beside the buffer, because reading the buffer makes the device wait.
        self._forward.step = int(predictors.steps)

    @property
    def weight(self) -> float:
        """λ at the present step."""
        return self.config.weight_at(self.steps)

    def set_weight(self, weight: float, *, observe: bool = False) -> None:
        """Another λ from now on; the head and the count of steps go on.

        Raises:
            ValueError: for a λ that `PReConfig` refuses, or where PRe would begin or cease to train its head: that
                takes another `attach`.
        """
        wanted = replace(self.config, weight=weight, observe=observe)
        if wanted.active != self.config.active:
            now = "learns" if self.config.active else "rests"
            raise ValueError(
                f"weight is {weight}, observe is {observe}, and the head {now}: detach and attach again to change that."
            )
        self.config = self._forward.config = wanted

    @property
    def loss(self) -> Tensor:
        """``λ · L_PRe`` of the latest forward (scalar float32); a zero connected to the head without pictures.

        With ``observe=True`` the coefficient is 1: the head learns, from detached states. With ``inject=True`` the
        gradient is on its way already, so this is a number to log, without graph.
        """
        summed = self._forward.loss_sum
        if summed is None:
            return torch.zeros((), device=next(self.vlm.layers.parameters()).device)
        loss = self._coefficient() * summed
        return loss.detach() if self.inject else loss

    def _coefficient(self) -> float:
        return (1.0 if self.config.observe else self.weight) / max(self.images_in_step or self._forward.images, 1)

    def _injected_coefficient(self) -> float:
        return self._coefficient() / self.accumulation

    @property
    def sight(self) -> Sight | None:
        """The numbers of the latest training forward, a mean over the layers; None before the first."""
        return self.seen.read() if self.seen else None

    @property
    def seen(self) -> Seen | None:
        """`sight` before it is read: its tensors are on the device still. None before the first training forward."""
        found = list(self._forward.seen.values())
        return Seen.mean(found) if found else None

    def seen_at(self, layer: int) -> Seen:
        """`seen` of one layer."""
        return self._forward.seen[layer]

    @property
    def loss_sum(self) -> Tensor | None:
        """L_PRe of the latest training forward, summed over its pictures and detached; None before the first."""
        summed = self._forward.loss_sum
        return None if summed is None else summed.detach()

    @property
    def sights(self) -> dict[int, Sight]:
        """`sight` of each layer."""
        return {layer: seen.read() for layer, seen in self._forward.seen.items()}

    @property
    def cosine(self) -> float | None:
        """Mean cosine between prediction and anchor in the latest training forward."""
        return self.sight.cosine if self.sight else None

    @property
    def tokens(self) -> int:
        """Visual tokens in the latest training forward."""
        return self.seen.tokens if self.seen else 0

    @property
    def skipped(self) -> int:
        """Samples without a picture in the latest training forward."""
        return self.seen.skipped if self.seen else 0

    def count_images(self, batch: dict[str, Any]) -> int:
        """Pictures in a processor's batch."""
        return self.vlm.image_tokens(batch).n_images

    def parameters(self) -> Iterable[nn.Parameter]:
        """The heads' parameters."""
        return self.predictors.heads.parameters()

    @property
    def needs_pictures(self) -> bool:
        """Whether batches must carry what `prepare` makes."""
        return self._forward.source.external is not None

    def prepare(self, images: list[Any], processor: Any) -> dict[str, Tensor]:
        """What a batch must carry for an external anchor besides the processor's output; empty for other anchors.

        Args:
            images: the batch's pictures (PIL), in order. processor: the model's.
        """
        external = self._forward.source.external
        return {} if external is None or not images else external.prepare(images, processor, self.vlm)

    def memory(self) -> dict[str, Any]:
        """What a resumed run must take back with `remember`, besides the model's weights and buffers, to go on bit for
        bit: the last picture's anchor. Tensors, numbers and tuples only."""
        return self._forward.memory()

    def remember(self, memory: dict[str, Any]) -> None:
        """Take back what `memory` gave."""
        self._forward.remember(memory)

    def follow(self) -> None:
        """Look again at what learns, after freezing or unfreezing: anchors that remember the encoder or projector must
        remember what has begun to learn, as it is now. Before the optimizer is built."""
        self.predictors.teacher = self._forward.source.follow()

    def peft(self, config: Any) -> Any:
        """A copy of a PEFT configuration with which the head stays trainable and is saved with the adapter.

        For ``get_peft_model(model, handle.peft(LoraConfig(...)))`` after `attach`.
        """
        changed = copy.copy(config)
        changed.modules_to_save = [*(config.modules_to_save or []), HEAD]
        return changed

    # ---- proof of life ---------------------------------------------------------------------------------------------

    def assert_alive(self, optimizer: torch.optim.Optimizer) -> None:
        """Check, after the backwards and before the optimizer step, that the predictive loss trains something.

        It looks at the latest forward of the step that had pictures.

        Raises:
            DeadLossError: see `keepsight.pre.life.assert_alive`.
        """
        if not self.config.active:
            return
        assert_alive(
            self._forward.life or self.seen,
            self.predictors.heads.values(),
            optimizer,
            layers=self.layers,
            image_token_id=self.vlm.image_token_id,
            observe=self.config.observe,
        )
        self._alive = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer callback: another training has another optimizer, so life must be proven again."""
        self._alive = not self.config.active
        self.accumulation = getattr(args, "gradient_accumulation_steps", 1)
        if self.inject and getattr(args, "fp16", False):
            raise ValueError(
                "inject=True with fp16=True: the injected gradient would not follow fp16's loss scaling. Train in "
                "bf16 or float32, or use PReTrainerMixin."
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer callback: stop a run whose predictive loss is dead, at the first step that holds pictures."""
        if not self._alive and self._forward.life is not None:
            self.assert_alive(kwargs["optimizer"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer callback: DeepSpeed's own optimizer steps on flat pieces, in which the head cannot be recognised."""
        if self.config.active and of_deepspeed(kwargs.get("optimizer")) is not None:
            self._stepped()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer callback: a whole run without one picture is no run with PRe."""
        if not self._alive_anywhere():
            raise DeadLossError(
                "training ended and not one batch held a picture, so predictive regularization did nothing. Check the "
                "data, or set weight=0."
            )
        external = self._forward.source.external
        if external is not None and not external.unchanged():
            raise DeadLossError(
                f"the weights of the external anchor {external.name!r} changed during training, so its targets did "
                "too: something trains or re-initialises it."
            )

    def _alive_anywhere(self) -> bool:
        """Whether any process proved life: one may never have had a picture."""
        if not (dist.is_available() and dist.is_initialized()):
            return self._alive
        alive = torch.tensor(int(self._alive), device=self.predictors.steps.device)
        dist.all_reduce(alive, op=dist.ReduceOp.MAX)
        return bool(alive)

    # ---- life ------------------------------------------------------------------------------------------------------

    def detach(self) -> None:
        """Take hooks and head off: the model is as before `attach`, save for what it learned."""
        _LIVE.discard(self)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if getattr(self.vlm.core, _HANDLE, None) is self:
            delattr(self.vlm.core, HEAD)
            delattr(self.vlm.core, _HANDLE)
        self._forward.clear()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _LIVE.add(self)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def _stepped(self) -> None:
        """An optimizer that holds the head has taken a step."""
        predictors = self.predictors
        self._forward.stepped()
        predictors.steps += 1
        predictors.commit_statistics()
        if predictors.teacher is not None:
            predictors.teacher.update(self.vlm)


_LIVE: weakref.WeakSet[Handle] = weakref.WeakSet()


def _after_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Whoever's training loop it is: the end of an optimizer step is where running averages move."""
    for handle in list(_LIVE):
        if not handle.config.active:
            continue
        own = {id(parameter) for parameter in handle.parameters()}
        if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            handle._stepped()


register_optimizer_step_post_hook(_after_optimizer_step)


def _resolve(vlm: Vlm, config: PReConfig) -> tuple[list[int], list[float]]:
    """Layer indices, rising, and their shares of the loss."""
    found = [vlm.resolve_layer(layer) for layer in config.layers]
    if 0 in found:
        raise ValueError(
            "layer is 0, the decoder's input, which is the anchor itself: choose a layer from 1 to "
            f"{vlm.depth}, 'middle' or 'last'."
        )
    if len(set(found)) < len(found):
        raise ValueError(f"layer {list(config.layers)} names a layer twice (indices {found}); name each once.")
    weights = config.layer_weights or (1.0,) * len(found)
    pairs = sorted(zip(found, weights, strict=True))
    return [layer for layer, _ in pairs], [weight / sum(weights) for _, weight in pairs]


def attach(model: nn.Module, config: PReConfig | None = None, *, inject: bool = False) -> Handle:
    """Attach Predictive Regularization to a model, in place.

    The model computes exactly what it did; ``model(**batch).loss`` is untouched. Add ``handle.loss`` to it, or train
    with `PReTrainerMixin`. Attach before the optimizer and before DDP are built; with PEFT, either after wrapping or
    before, with `Handle.peft`.

    Args:
        model: any image-text-to-text model of transformers.
        config: None for the paper's settings.
        inject: for trainers that cannot be changed: the gradient of ``λ · L_PRe`` enters at the layer during the
            ordinary backward, so that nothing need be added to the loss; give the handle to the trainer as a callback.
            L_PRe is then a mean of the micro-batches' means, which equals the mean over the global batch when every
            micro-batch holds the same number of pictures. Not with fp16 loss scaling.

    Raises:
        ValueError: for a family without visual tokens in the decoder, a layer that does not exist, or a second attach.
    """
    return Handle(model, config or PReConfig(), inject=inject)


def handle_of(model: nn.Module) -> Handle | None:
    """The handle attached to a model (also through PEFT, DDP or `torch.compile`), or None."""
    base = unwrap(model)
    return getattr(getattr(base, "base_model", base), _HANDLE, None)


def param_groups(model: nn.Module, *, head_lr: float | None = None) -> list[dict[str, Any]]:
    """Two optimizer groups of what is trainable: the model's parameters, and the head's.

    Args:
        model: a model with PRe attached.
        head_lr: learning rate of the head; None = that of `PReConfig`, or else the optimizer's default.

    Raises:
        ValueError: when nothing is attached.
    """
    handle = handle_of(model)
    if handle is None:
        raise ValueError("nothing is attached to this model: call keepsight.attach(model, PReConfig()) first.")
    head = {id(parameter) for parameter in handle.parameters()}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.requires_grad and id(p) not in head]},
        {"params": [p for p in handle.parameters() if p.requires_grad]},
    ]
    rate = head_lr if head_lr is not None else handle.config.head_lr
    if rate is not None:
        groups[1]["lr"] = rate
    return [group for group in groups if group["params"]]
