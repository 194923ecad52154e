"""The proof that a predictive loss trains something, and the trainer callback that asks for it and logs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from keepsight.pre.curves import Curves
from keepsight.pre.sight import Seen
from keepsight.trainer_log import add_to_log, go_first

if TYPE_CHECKING:
    from keepsight.pre.handle import Handle


class DeadLossError(RuntimeError):
    """The predictive loss trains nothing; the message says why and what to do."""


def assert_alive(
    seen: Seen | None,
    heads: Iterable[nn.Module],
    optimizer: torch.optim.Optimizer,
    *,
    layers: Iterable[int],
    image_token_id: int,
    observe: bool,
) -> None:
    """Check, after a backward and before the optimizer step, that the predictive loss trains something.

    Args:
        seen: the latest training forward; heads: one a layer; layers: where they read; observe: whether the
            model is not meant to learn from it.

    Raises:
        DeadLossError: when a head is frozen, not in the optimizer or without gradient; when a batch with pixels
            held no visual token; when the anchor is the same for all tokens; when no gradient can reach the model.
    """
    if seen is None or seen.tokens == 0:
        raise DeadLossError(
            "the training forward saw 0 visual tokens: the loss is zero and trains nothing. Check that the "
            f"batches hold the image token (id {image_token_id}) and pixel values, and that the model is "
            "in train()."
        )
    heads = list(heads)
    parameters = [parameter for head in heads for parameter in head.parameters()]
    if not all(parameter.requires_grad for parameter in parameters):
        raise DeadLossError(
            "the prediction head is frozen (requires_grad is False), for example because get_peft_model ran after "
            "attach. Attach after wrapping with PEFT, or unfreeze handle.parameters()."
        )
    known = {id(parameter) for group in _groups(optimizer) for parameter in group}
    if not all(id(parameter) in known for parameter in parameters):
        raise DeadLossError(
            "the prediction head is not in the optimizer: attach before building the optimizer, or build it from "
            "keepsight.param_groups(model)."
        )
    # DeepSpeed takes gradients away in the backward, and asking for one makes a process wait for all others.
    reduced = of_deepspeed(optimizer) is not None
    if not reduced and not all(any(_has_gradient(parameter) for parameter in head.parameters()) for head in heads):
        raise DeadLossError(
            "the prediction head got no gradient: add handle.loss to the loss before backward(), or use "
            "PReTrainerMixin. If it is added, its gradient is zero to the last digit: with granularity 'relational', "
            "because the head predicts all but the same for all tokens of a picture; use 'patch'."
        )
    if not bool(seen.anchor_varies):
        raise DeadLossError(
            f"the anchor is the same for all {seen.tokens} visual tokens, so there is nothing to predict: check "
            "the pictures, the vision encoder's weights and the projector."
        )
    if not observe and not seen.reaches_model:
        raise DeadLossError(
            f"no gradient can reach the model from layer {', '.join(map(str, layers))}: nothing at or below that "
            "layer is trainable, or reentrant gradient checkpointing hides it (set "
            "gradient_checkpointing_kwargs={'use_reentrant': False})."
        )


def _has_gradient(parameter: nn.Parameter) -> bool:
    """Whether a gradient other than zero is there; of a sharded one, in this process's share (no process waits).

    NaN counts: a loss scaler's first scale overflows and its step is left out, which is not a dead loss.
    """
    gradient = parameter.grad
    if gradient is None:
        return False
    own = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return own.numel() == 0 or bool(own.abs().sum() != 0)


def _is_shard(parameter: nn.Parameter) -> bool:
    """Whether FSDP2 or ZeRO-3 holds it in shards."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def of_deepspeed(optimizer: Any) -> Any:
    """DeepSpeed's ZeRO optimizer inside the wrapper that accelerate puts around it; None where there is none."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if type(inner).__module__.startswith("deepspeed.") else None


def _groups(optimizer: torch.optim.Optimizer) -> list[list[nn.Parameter]]:
    """The model's parameters that the optimizer holds; those of ZeRO's own groups are flat pieces of several."""
    engine = of_deepspeed(optimizer)
    for name in ("bit16_groups", "fp16_groups", "bf16_groups"):  # ZeRO-1 and -2, ZeRO-3, ZeRO-1 summing in float32
        if found := getattr(engine, name, None):
            return found
    return [group["params"] for group in optimizer.param_groups]


class ProofOfLife(TrainerCallback):
    """The part of `Handle` that a trainer calls: it stops a run whose predictive loss is dead, and with ``inject=True``
    logs the ``pre_*`` numbers of `PReTrainerMixin` with the trainer's own. All processes must log."""

    def assert_alive(self: Handle, optimizer: torch.optim.Optimizer) -> None:
        """Check, after the backwards and before the optimizer step, that the predictive loss trains something.

        It looks at the latest forward of the step that had pictures. Where λ has decayed to 0, nothing is to be proven.

        Raises:
            DeadLossError: see `keepsight.pre.life.assert_alive`.
        """
        if not self.config.active:
            return
        if not self.config.observe and self.weight == 0:  # where `decay_steps` end there is no gradient to ask for
            self._alive = True
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

    def on_step_begin(self: Handle, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer callback: an injected gradient must know the step's micro-batches; an epoch's last may have fewer."""
        wanted, loader = getattr(args, "gradient_accumulation_steps", 1), kwargs.get("train_dataloader")
        if loader is not None and has_length(loader) and len(loader):  # streams have none
            updates = -(-len(loader) // wanted)
            last = state.global_step % updates == updates - 1
            wanted = len(loader) - (updates - 1) * wanted if last else wanted
        self.accumulation = wanted

    def on_train_begin(self: Handle, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer callback: another training has another optimizer, so life must be proven again."""
        self._alive = not self.config.active
        self._resumed = state is not None and state.global_step > 0
        self._curves = Curves()
        self._check_rate(kwargs.get("optimizer"))
        if self.predictors.teacher is not None and any(map(_is_shard, self.vlm.base.parameters())):
            raise ValueError(
                f"the anchor {self.config.anchor!r} keeps averages of whole weights, and this trainer has them in "
                "shards: train under ZeRO-2 or DDP, or with the anchor 'pre_llm'."
            )
        if self._resumed and self.inject:  # `PReTrainerMixin` knows what it resumes from
            self.load_memory(_checkpoint(args, state))
        if self._resumed and self.config.active and self.steps == 0:
            warnings.warn(
                f"training goes on at step {state.global_step} with a new prediction head, because the checkpoint held "
                "none: λ's schedule and running statistics begin again. With PEFT, attach first and wrap with "
                "handle.peft(config), which saves the head with the adapter.",
                stacklevel=2,
            )
        if self._logs:
            go_first(self)
        self.accumulation = getattr(args, "gradient_accumulation_steps", 1)
        if self.inject and getattr(args, "fp16", False):
            raise ValueError(
                "inject=True with fp16=True: the injected gradient would not follow fp16's loss scaling. Train in "
                "bf16 or float32, or use PReTrainerMixin."
            )

    def _check_rate(self: Handle, optimizer: Any) -> None:
        """A trainer that knows nothing of PRe knows nothing of the head's learning rate either."""
        wanted, head = self.config.head_lr, {id(parameter) for parameter in self.parameters()}
        if not self.inject or wanted is None or not self.config.active or of_deepspeed(optimizer) is not None:
            return
        groups = getattr(optimizer, "param_groups", [])
        rates = {g.get("initial_lr", g["lr"]) for g in groups if any(id(p) in head for p in g["params"])}
        if rates - {wanted}:
            raise ValueError(
                f"head_lr is {wanted} with inject=True, and the trainer's optimizer has the head at "
                f"{', '.join(map(str, sorted(rates)))}: give the trainer an optimizer made from "
                "keepsight.param_groups(model), use PReTrainerMixin, or set head_lr to None."
            )

    def on_pre_optimizer_step(self: Handle, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer callback: stop a run whose predictive loss is dead, at the first step that holds pictures; a step's
        last micro-batch."""
        if not self._alive and self._forward.life is not None:
            self.assert_alive(kwargs["optimizer"])
        if self._logs:  # now, because λ changes with the step
            self._curves.add(self)
            self._curves.steps += 1

    def on_save(self: Handle, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer callback: what a resumed training must remember goes into the checkpoint."""
        if self.config.active and (folder := _checkpoint(args, state)).is_dir():
            self.save_memory(folder)

    def on_substep_end(self: Handle, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer callback: a micro-batch that is not its step's last."""
        if self._logs:
            self._curves.add(self)

    def on_step_end(self: Handle, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer callback: DeepSpeed's own optimizer steps on flat pieces, in which the head cannot be recognised."""
        if self.config.active and of_deepspeed(kwargs.get("optimizer")) is not None:
            self.stepped()

    def on_log(self: Handle, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Trainer callback: what the predictive loss saw since the last log, beside the trainer's numbers."""
        if logs is not None and "loss" in logs and self._curves.steps:
            numbers, _ = self._curves.read(_sum_over_processes)
            add_to_log(logs, state, numbers)
            self._curves = Curves()

    @property
    def _logs(self: Handle) -> bool:
        """`PReTrainerMixin` logs by itself; a trainer that knows nothing of PRe has this callback to do it."""
        return self.inject and self.config.active

    def on_train_end(self: Handle, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer callback: a whole run without one picture is no run with PRe.

        One that resumed shows only a part of itself, and one that took no step shows nothing: neither is called dead.
        """
        if not self._alive_anywhere() and not self._resumed and state.global_step > 0:
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

    def _alive_anywhere(self: Handle) -> bool:
        """Whether any process proved life: one may never have had a picture."""
        return bool(_sum_over_processes(torch.tensor(int(self._alive), device=self.predictors.steps.device)))


def _sum_over_processes(number: torch.Tensor) -> torch.Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(number)
    return number


def _checkpoint(args: Any, state: Any) -> Path:
    """Where `Trainer` writes the checkpoint of its present step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
