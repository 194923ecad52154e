"""Predictive Regularization inside HF `Trainer` and its subclasses, with the exact global mean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from keepsight.pre.attaching import handle_of
from keepsight.pre.curves import Curves
from keepsight.pre.handle import HEAD, Handle
from keepsight.training.sharding import check_deepspeed, shard_head

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer  # what it is mixed into
else:
    _Trainer = object


class PReTrainerMixin(_Trainer):
    """Adds ``λ · L_PRe`` to the loss of a `Trainer` subclass: ``class MyTrainer(PReTrainerMixin, Trainer)``.

    Attach to the model first (`keepsight.attach`); everything else stays as it was. L_PRe is the mean over the pictures
    of the whole optimizer step: the micro-batches that gradient accumulation prefetches, of all processes. So one batch
    of 8 and eight accumulated batches of 1 train alike, whatever share of samples holds pictures.

    Logged beside the trainer's own numbers, as means since the last log over all processes: ``lm_loss`` (what the
    bare trainer would have logged as ``loss``), ``pre_loss`` (L_PRe, without λ), ``pre_cosine``, ``pre_margin`` (see
    `keepsight.pre.sight.Sight`), and per step ``pre_images``, ``pre_tokens``, ``pre_skipped``; with several layers
    ``pre_cosine_<layer>`` for each, with a schedule ``pre_weight``, λ at the latest step.

    The head's gradient is clipped apart from the model's (``max_grad_norm`` each), so that the head cannot change how
    far the model steps. Before the first step that saw pictures `Handle.assert_alive` stops a dead run.

    Raises:
        ValueError: at construction, when nothing is attached to the model, and for what does not go with DeepSpeed's
            settings.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.model is not None
        handle = handle_of(self.model)
        if handle is None:
            raise ValueError(
                "the trainer's model has no predictive regularization attached: call "
                "keepsight.attach(model, keepsight.PReConfig()) before building the trainer (weight=0: the baseline)."
            )
        if handle.inject:
            raise ValueError(
                "PRe is attached with inject=True, so its gradient enters by itself, and PReTrainerMixin would add it "
                "again: attach without inject, or use the plain trainer with callbacks=[handle]."
            )
        check_deepspeed(self.accelerator, handle, head_lr=handle.config.head_lr)
        self.pre: Handle = handle
        if handle not in self.callback_handler.callbacks:  # given as a callback as well
            self.add_callback(handle)
        # The one place that every version of Trainer clips through.
        self._clip = self.accelerator.clip_grad_norm_
        self.accelerator.clip_grad_norm_ = self._clip_apart
        self._curves = Curves()
        self.pre_totals = dict.fromkeys(("images", "tokens", "skipped"), 0)  # of all steps that were logged

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The trainer's optimizer, with the head in a group of its own when it has a learning rate of its own.

        One that was given to the trainer stays as it is if the head is in groups of its own (`param_groups`).
        """
        given = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        shard_head(self.accelerator, self.pre, optimizer)
        if self.pre.config.head_lr is not None and not (given and is_apart(optimizer, self.pre.parameters())):
            set_apart(optimizer, self.pre.parameters(), self.pre.config.head_lr, "keepsight_head")
        return optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of one optimizer step, their pictures counted over all processes."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.pre.config.active or self.is_deepspeed_enabled:
            counts = [self.pre.count_images(batch) for batch in batches]
            found = self.accelerator.reduce(torch.tensor([sum(counts), counts.count(0)], device=device))
            images, empty = found.tolist()
            if self.is_deepspeed_enabled and empty:
                raise ValueError(
                    f"{empty} micro-batches of this step hold no picture, and DeepSpeed's other processes would wait "
                    "for their share of encoder and projector for ever. Leave text-only samples out, take a larger "
                    "micro-batch, or train under FSDP2 or DDP."
                )
            self.pre.images_in_step = images
        return batches, items

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's loss plus ``λ · L_PRe``, scaled so that its gradient is that of the global mean."""
        result: Any = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if not (model.training and torch.is_grad_enabled()):
            return result
        loss, outputs = result if return_outputs else (result, None)
        if not loss.requires_grad:
            # A micro-batch of text alone while only the projector or the encoder learns: nothing to learn, no crash.
            learning = [p for p in self.pre.vlm.base.parameters() if p.requires_grad]
            loss = loss + 0.0 * torch.stack([p.sum().to(loss) for p in learning]).sum()
        # What the trainer will still do to this number: divide by the accumulation steps unless the LM loss was
        # normalised over the step already; DistributedDataParallel averages gradients over processes.
        divisor = 1 if self._normalised_over_step(num_items_in_batch) else self.current_gradient_accumulation_steps
        processes = self.accelerator.num_processes
        predictive = self.pre.loss.to(loss.device)
        self._curves.add(self.pre, loss.detach() / divisor)
        total = loss + predictive * (divisor * processes)
        return (total, outputs) if return_outputs else total

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        self._loaded_from = resume_from_checkpoint
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.pre.load_memory(checkpoint)

    def _load_best_model(self) -> None:
        self._loaded_from = self.state.best_model_checkpoint
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """`Trainer` reads weights (resuming, and the best ones at the end) by the names in the file. Several families
        (LLaVA, …) have others in memory, and it would go on with what it has; `from_pretrained` knows both names."""
        base = self.pre.vlm.base
        own = {name for name, _ in base.named_parameters() if HEAD not in name.split(".")}
        if own & set(load_result.missing_keys) and hasattr(base, "from_pretrained"):
            plain = type(base).from_pretrained(self._loaded_from, dtype=base.dtype, use_safetensors=True)
            load_result = base.load_state_dict(plain.state_dict(), strict=False)
            lost = sorted(own & set(load_result.missing_keys))
            if lost:
                raise ValueError(
                    f"checkpoint '{self._loaded_from}' lacks {lost[:3]} ({len(lost)} in all), so training would go on "
                    "from other weights: it is of another model. Resume with the model it was written from."
                )
            return
        super()._issue_warnings_after_load(load_result)

    def _normalised_over_step(self, num_items_in_batch: Any) -> bool:
        flag = getattr(self, "loss_is_scaled_for_ga", None)
        if flag is not None:
            return flag
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_model or self.compute_loss_func is not None

    def _clip_apart(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> Any:
        """Clip the model's gradients as if the head were not there, then the head's by themselves."""
        head = list(self.pre.parameters())
        apart = {id(parameter) for parameter in head}
        base = [parameter for parameter in parameters if id(parameter) not in apart]
        norm = self._clip(base, max_norm, norm_type=norm_type)  # in fp16 this unscales all gradients first
        torch.nn.utils.clip_grad_norm_(head, max_norm, norm_type=norm_type)
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's log, with what the predictive loss saw since the last one."""
        if "loss" in logs and self._curves.steps:
            logs.update(self.read_log())
        super().log(logs, *args, **kwargs)

    def read_log(self) -> dict[str, float]:
        """What the predictive loss saw since the last log, added to `pre_totals`; every process must call it."""
        if not self._curves.steps:
            return {}
        logs = self._read()
        self.pre_totals = self._totals_with(logs)
        self._curves = Curves()
        return logs

    def read_totals(self) -> dict[str, int]:
        """`pre_totals` and what came since the last log, which stays to be logged; every process must call it."""
        return self._totals_with(self._read()) if self._curves.steps else dict(self.pre_totals)

    def _read(self) -> dict[str, float]:
        numbers, lm_loss = self._curves.read(self.accelerator.reduce)
        return {"lm_loss": lm_loss / self._curves.steps / self.accelerator.num_processes, **numbers}

    def _totals_with(self, logs: dict[str, float]) -> dict[str, int]:
        return {name: n + round(logs[f"pre_{name}"] * self._curves.steps) for name, n in self.pre_totals.items()}

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; counts optimizer steps for the log."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.gradient_state.sync_gradients:
            self._curves.steps += 1
        return loss


def is_apart(optimizer: torch.optim.Optimizer, chosen: Iterable[Tensor]) -> bool:
    """Whether an optimizer holds these parameters in groups without others."""
    wanted = {id(parameter) for parameter in chosen}
    groups = [{id(parameter) for parameter in group["params"]} for group in optimizer.param_groups]
    mine = [group for group in groups if group & wanted]
    return set().union(*mine) == wanted


def set_apart(optimizer: torch.optim.Optimizer, chosen: Iterable[Tensor], rate: float, mark: str) -> None:
    """Give parameters that an optimizer holds a group and learning rate of their own; a second call does nothing."""
    if any(group.get(mark) for group in optimizer.param_groups):
        return
    wanted, moved, decay = {id(parameter) for parameter in chosen}, [], 0.0
    for group in optimizer.param_groups:
        mine = [parameter for parameter in group["params"] if id(parameter) in wanted]
        if mine:
            decay = max(decay, group.get("weight_decay", 0.0))
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in wanted]
            moved += mine
    optimizer.add_param_group({"params": moved, "lr": rate, "weight_decay": decay, mark: True})
