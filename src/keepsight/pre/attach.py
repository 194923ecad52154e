"""Attach Predictive Regularization to any model, and take it off again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from keepsight.pre.config import PReConfig
from keepsight.pre.head import PredictionHead
from keepsight.pre.objective import predictive_loss_sum
from keepsight.pre.sight import Observer, Seen, Sight
from keepsight.vlm.grids import ImageTokens
from keepsight.vlm.view import Vlm, hidden_states_in, hidden_states_out, unwrap

HEAD = "keepsight_head"  # the submodule's name, hence a part of parameter names in checkpoints
_HANDLE = "_keepsight_handle"


class DeadLossError(RuntimeError):
    """The predictive loss trains nothing; the message says why and what to do."""


class Handle(TrainerCallback):
    """Predictive Regularization at work on one model; made by `attach`.

    After every training forward, `loss` is ``λ · L_PRe`` of that forward, in the autograd graph. Under ``eval()``,
    ``no_grad`` and ``generate`` nothing is computed and `loss` is zero. As a `TrainerCallback` it checks once, before
    the first optimizer step that saw pictures, that the loss is alive (`assert_alive`).

    Attributes:
        config: as given. ``layer``: the resolved layer index.
        head: the `PredictionHead`, a submodule of the model, so that optimizers, checkpoints and DDP see it.
        images_in_step: the number of pictures over which L_PRe is a mean. None = the pictures of the forward. With
            gradient accumulation or several processes, set it to the pictures of the whole step (`count_images`) to
            get the mean over the global batch, and do not divide the loss again.
    """

    def __init__(self, model: nn.Module, config: PReConfig) -> None:
        self.vlm = Vlm(model)
        self.config = config
        self.layer = self.vlm.resolve_layer(config.layer)
        if self.layer == 0:
            raise ValueError(
                "layer is 0, the decoder's input, which is the anchor itself: choose a layer from 1 to "
                f"{self.vlm.depth}, 'middle' or 'last'."
            )
        core = self.vlm.core
        if getattr(core, _HANDLE, None) is not None:
            raise ValueError(
                "predictive regularization is attached to this model already; call detach() on the first handle "
                "(keepsight.handle_of(model)) before attaching again."
            )
        width = self.vlm.width
        self.head = PredictionHead(width, width, config.hidden or width, seed=config.seed)
        self.head.requires_grad_(config.active)
        self.head.to(next(self.vlm.layers[self.layer - 1].parameters()).device)
        core.add_module(HEAD, self.head)
        setattr(core, _HANDLE, self)
        self.images_in_step: int | None = None
        self._loss_sum: Tensor | None = None
        self._images = 0
        self._seen: Seen | None = None
        self._sight: Sight | None = None
        self._alive = not config.active
        self._tokens: ImageTokens | None = None  # not None = armed
        self._index: Tensor | None = None
        self._anchor: Tensor | None = None
        self._state: Tensor | None = None
        self._observer = Observer()
        # Bound methods, so that a deep copy of the model carries a handle and a head of its own.
        self._hooks = [
            core.register_forward_pre_hook(self._begin, with_kwargs=True),
            core.register_forward_hook(self._finish),
            self.vlm.layers[0].register_forward_pre_hook(self._take_anchor, with_kwargs=True),
            self.vlm.layers[self.layer - 1].register_forward_hook(self._take_state),
        ]

    # ---- what a training loop reads --------------------------------------------------------------------------------

    @property
    def loss(self) -> Tensor:
        """``λ · L_PRe`` of the latest forward (scalar float32); a zero connected to the head without pictures.

        With ``observe=True`` the coefficient is 1: the head learns, from detached states.
        """
        if self._loss_sum is None:
            return torch.zeros((), device=self.head.up.weight.device)
        coefficient = 1.0 if self.config.observe else self.config.weight
        return coefficient * self._loss_sum / max(self.images_in_step or self._images, 1)

    @property
    def sight(self) -> Sight | None:
        """The numbers of the latest training forward, read from the device on demand; None before the first."""
        if self._sight is None and self._seen is not None:
            self._sight = self._seen.read()
        return self._sight

    @property
    def seen(self) -> Seen | None:
        """`sight` before it is read: its tensors are on the device still. None before the first training forward."""
        return self._seen

    @property
    def cosine(self) -> float | None:
        """Mean cosine between prediction and anchor in the latest training forward."""
        return self.sight.cosine if self.sight else None

    @property
    def tokens(self) -> int:
        """Visual tokens in the latest training forward."""
        return self._seen.tokens if self._seen else 0

    @property
    def skipped(self) -> int:
        """Samples without a picture in the latest training forward."""
        return self._seen.skipped if self._seen else 0

    def count_images(self, batch: dict[str, Any]) -> int:
        """Pictures in a processor's batch."""
        return self.vlm.image_tokens(batch).n_images

    def parameters(self) -> Iterable[nn.Parameter]:
        """The head's parameters."""
        return self.head.parameters()

    # ---- proof of life ---------------------------------------------------------------------------------------------

    def assert_alive(self, optimizer: torch.optim.Optimizer) -> None:
        """Check, after a backward and before the optimizer step, that the predictive loss trains something.

        Raises:
            DeadLossError: when the head is frozen, not in the optimizer or without gradient; when a batch with pixels
                held no visual token; when the anchor is the same for all tokens; when no gradient can reach the
                model from layer ``layer``.
        """
        if not self.config.active:
            return
        seen = self._seen
        if seen is None or seen.tokens == 0:
            raise DeadLossError(
                "the training forward saw 0 visual tokens: the loss is zero and trains nothing. Check that the "
                f"batches hold the image token (id {self.vlm.image_token_id}) and pixel values, and that the model is "
                "in train()."
            )
        parameters = list(self.head.parameters())
        if not all(parameter.requires_grad for parameter in parameters):
            raise DeadLossError(
                "the prediction head is frozen (requires_grad is False), for example because get_peft_model ran after "
                "attach. Attach after wrapping with PEFT, or unfreeze handle.head."
            )
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not all(id(parameter) in known for parameter in parameters):
            raise DeadLossError(
                "the prediction head is not in the optimizer: attach before building the optimizer, or build it from "
                "keepsight.param_groups(model)."
            )
        if not all(parameter.grad is not None for parameter in parameters) or not any(
            bool(parameter.grad.abs().sum() > 0) for parameter in parameters if parameter.grad is not None
        ):
            raise DeadLossError(
                "the prediction head got no gradient: add handle.loss to the loss before backward(), or use "
                "PReTrainerMixin."
            )
        if not bool(seen.anchor_varies):
            raise DeadLossError(
                f"the anchor is the same for all {seen.tokens} visual tokens, so there is nothing to predict: check "
                "the pictures, the vision encoder's weights and the projector."
            )
        if not self.config.observe and not seen.reaches_model:
            raise DeadLossError(
                f"no gradient can reach the model from layer {self.layer}: nothing at or below that layer is "
                "trainable, or reentrant gradient checkpointing hides it (set "
                "gradient_checkpointing_kwargs={'use_reentrant': False})."
            )
        self._alive = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer callback: another training has another optimizer, so life must be proven again."""
        self._alive = not self.config.active

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer callback: stop a run whose predictive loss is dead, at the first step that holds pictures."""
        if not self._alive and self._seen is not None and (self._seen.images > 0 or self._seen.had_pixels):
            self.assert_alive(kwargs["optimizer"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer callback: a whole run without one picture is no run with PRe."""
        if not self._alive:
            raise DeadLossError(
                "training ended and not one batch held a picture, so predictive regularization did nothing. Check the "
                "data, or set weight=0."
            )

    # ---- life ------------------------------------------------------------------------------------------------------

    def detach(self) -> None:
        """Take hooks and head off: the model is as before `attach`, save for what it learned."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if getattr(self.vlm.core, _HANDLE, None) is self:
            delattr(self.vlm.core, HEAD)
            delattr(self.vlm.core, _HANDLE)
        self._disarm()
        self._loss_sum = self._seen = self._sight = None

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to one forward (tensors in an autograd graph) cannot be copied and need not be.
        transient = ("_loss_sum", "_seen", "_sight", "_tokens", "_index", "_anchor", "_state")
        return {**self.__dict__, **dict.fromkeys(transient)}

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    # ---- hooks -----------------------------------------------------------------------------------------------------

    def _disarm(self) -> None:
        # Layers that gradient checkpointing recomputes in the backward find the handle disarmed.
        self._tokens = self._index = self._anchor = self._state = None

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._disarm()
        self._loss_sum = None
        if not (self.config.active and module.training and torch.is_grad_enabled()):
            return
        batch = self.vlm.bind(args, kwargs)
        mask = self.vlm.visual_mask(batch["input_ids"])
        self._tokens = self.vlm.image_tokens(batch)
        self._index = mask.flatten().nonzero(as_tuple=True)[0]
        self._skipped = int((~mask.any(dim=1)).sum())
        self._had_pixels = batch.get("pixel_values") is not None

    def _take_anchor(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._index is not None:
            hidden = hidden_states_in(args, kwargs).detach()  # stop-gradient
            self._anchor = hidden.flatten(0, 1).index_select(0, self._index.to(hidden.device))

    def _take_state(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._index is not None:
            # Gathered later: an extra operation here could run inside a checkpointed region and not in its replay.
            self._state = hidden_states_out(output)

    def _finish(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tokens, index, anchor, state = self._tokens, self._index, self._anchor, self._state
        self._disarm()
        if tokens is None or index is None:
            return
        assert anchor is not None, "decoder layer 0 did not run"
        assert state is not None, f"decoder layer {self.layer} did not run"
        self._sight = None
        self._images = tokens.n_images
        if tokens.n_images == 0:
            # Connected to the head, so that every process of a distributed run has the same graph.
            self._loss_sum = 0.0 * torch.stack([p.sum() for p in self.head.parameters()]).sum()
            self._seen = self._observer.nothing(self._skipped, self._had_pixels)
            return
        states = state.flatten(0, 1).index_select(0, index.to(state.device))  # [T, d]
        if self.config.observe:
            states = states.detach()
        prediction = self.head(states)
        anchor = anchor.to(prediction.device)
        self._loss_sum = predictive_loss_sum(prediction, anchor, tokens)
        self._seen = self._observer.look(
            prediction.detach(), anchor, tokens, skipped=self._skipped, reaches_model=state.requires_grad
        )


def attach(model: nn.Module, config: PReConfig | None = None) -> Handle:
    """Attach Predictive Regularization to a model, in place.

    The model computes exactly what it did; ``model(**batch).loss`` is untouched. Add ``handle.loss`` to it, or train
    with `PReTrainerMixin`. Attach before the optimizer and before DDP are built, and after wrapping with PEFT.

    Args:
        model: any image-text-to-text model of transformers.
        config: None for the paper's settings.

    Raises:
        ValueError: for a family without visual tokens in the decoder, a layer that does not exist, or a second attach.
    """
    return Handle(model, config or PReConfig())


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
