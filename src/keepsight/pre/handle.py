"""Predictive Regularization at work on one model: what a training loop reads from it and tells it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from keepsight.pre import steps
from keepsight.pre.config import PReConfig
from keepsight.pre.curves import Curves
from keepsight.pre.forward import ForwardPass
from keepsight.pre.head import PredictionHead, Predictors
from keepsight.pre.layers import resolve_layers
from keepsight.pre.life import ProofOfLife
from keepsight.pre.sight import Seen, Sight
from keepsight.processes import rank
from keepsight.vlm.view import OfModel, Vlm

HEAD = "keepsight_head"  # the submodule's name, hence a part of parameter names in checkpoints
MEMORY = "keepsight_memory_{rank}.pt"  # of each process: the pictures that it saw
HANDLE = "_keepsight_handle"  # the attribute of the model that holds it


class Handle(OfModel, ProofOfLife):
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
        if isinstance(model, DistributedDataParallel):
            raise ValueError(
                "the model is wrapped in DistributedDataParallel, which would not see the head and leave it different "
                "in every process: attach to the model itself, then wrap it."
            )
        self.vlm = Vlm(model)
        self.config = config
        self.inject = inject
        self.layers, shares = resolve_layers(self.vlm, config)
        self.layer = self.layers[-1]
        core = self.vlm.core
        if getattr(core, HANDLE, None) is not None:
            raise ValueError(
                "predictive regularization is attached to this model already; call detach() on the first handle "
                "(keepsight.handle_of(model)) before attaching again."
            )
        self.images_in_step: int | None = None
        self.accumulation = 1
        self._copied: Any = None
        self._curves = Curves()
        self._forward: ForwardPass = ForwardPass(
            self.vlm, config, self.layers, shares, inject=inject, coefficient=self._injected_coefficient
        )
        predictors = Predictors(self._forward.widths, self._forward.targets, self.vlm.width, config)
        predictors.teacher = self._forward.source.teacher
        predictors.requires_grad_(config.active)
        predictors.to(next(self.vlm.layers[self.layer - 1].parameters()).device)
        core.add_module(HEAD, predictors)
        setattr(core, HANDLE, self)
        self._alive = not config.active
        self._resumed = False
        predictors.register_load_state_dict_post_hook(self._restore_steps)
        self._hooks = self._forward.hook(self._find_predictors)
        steps.watch(self)

    # ---- what a training loop reads --------------------------------------------------------------------------------

    @property
    def predictors(self) -> Predictors:
        """The submodule that PRe added to the model."""
        return self._find_predictors()

    def _find_predictors(self) -> Predictors:
        module: Any = getattr(self.vlm.core, HEAD)
        if hasattr(module, "modules_to_save"):  # PEFT trains and saves a copy
            module = module.modules_to_save[module.active_adapters[0]]
            if (
                module is not self._copied
            ):  # with its averages; and adapters between pixels and decoder learn from now on
                self._copied, self._forward.source.teacher = module, module.teacher
                module.teacher = self._forward.source.follow()
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
        if predictors is self._find_predictors():  # and not what PEFT keeps of before
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

    def save_memory(self, folder: str | Path) -> None:
        """Write `memory` beside a checkpoint, a file a process. As a callback of `Trainer` it does so by itself."""
        torch.save(self.memory(), Path(folder) / MEMORY.format(rank=rank()))

    def load_memory(self, folder: str | Path) -> None:
        """`remember` what `save_memory` of this process wrote there, if it did."""
        if (file := Path(folder) / MEMORY.format(rank=rank())).is_file():
            self.remember(torch.load(file, weights_only=True, map_location="cpu"))

    def follow(self) -> None:
        """Look again at what learns, after freezing or unfreezing: anchors that remember the encoder or projector must
        remember what has begun to learn, as it is now. Before the optimizer is built."""
        predictors = self.predictors
        predictors.teacher = self._forward.source.follow()

    def peft(self, config: Any) -> Any:
        """A copy of a PEFT configuration with which the head stays trainable and is saved with the adapter.

        For ``get_peft_model(model, handle.peft(LoraConfig(...)))`` after `attach`.
        """
        changed = copy.copy(config)
        changed.modules_to_save = [*(config.modules_to_save or []), HEAD]
        return changed

    # ---- life ------------------------------------------------------------------------------------------------------

    def detach(self) -> None:
        """Take hooks and head off: the model is as before `attach`, save for what it learned."""
        steps.forget(self)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if getattr(self.vlm.core, HANDLE, None) is self:
            delattr(self.vlm.core, HEAD)
            delattr(self.vlm.core, HANDLE)
            for config in getattr(self.vlm.base, "peft_config", {}).values():  # what `peft` put there would be saved
                kept = [name for name in getattr(config, "modules_to_save", None) or [] if name != HEAD]
                if hasattr(config, "modules_to_save"):
                    config.modules_to_save = kept or None
        self._forward.clear()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        steps.watch(self)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def stepped(self) -> None:
        """An optimizer that holds the head has taken a step."""
        predictors = self.predictors
        self._forward.stepped()
        predictors.steps += 1
        predictors.commit_statistics()
        if predictors.teacher is not None:
            predictors.teacher.update(self.vlm)
