"""The training loop that pretraining shares: deterministic in the step number, resumable after a kill."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """The learning rate: linear warm-up, a cosine that would reach zero at `horizon`, cut short by a linear
    run-down over the last `rundown` of `steps`. Until the run-down, a step's rate does not depend on `steps`: a run
    can be lengthened without making it anew.

    With `matrix_lr` the weight matrices between embedding and output are trained by Muon, at this peak rate, and the
    rest by AdamW: language models of this size then learn to look things up in a tenth of the steps."""

    steps: int
    batch: int
    lr: float
    horizon: int
    rundown: int
    warmup: int = 100
    weight_decay: float = 0.01
    matrix_lr: float | None = None
    save_every: int = 100

    def rate(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.horizon - self.warmup)
        cosine = self.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
        return cosine * min(1.0, (self.steps - step) / self.rundown)


def train(module: nn.Module, loss_of: Callable[[int], tuple[Tensor, str]], schedule: Schedule, state: Path) -> None:
    """Trains the parameters of `module` that require gradients.

    `loss_of(step)` must draw its data from the step number alone: then a run that was stopped and goes on from its
    `state` file sees what an uninterrupted one would have seen. A finished stage returns at once.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizers = _optimizers(module, schedule)
    first = 0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        for parameter, value in zip(parameters, saved["parameters"], strict=True):
            parameter.data.copy_(value)
        for optimizer, value in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(value)
        first = int(saved["step"])
        logger.info("%s: going on from step %d", state.stem, first)
    began = time.monotonic()
    for step in range(first, schedule.steps):
        for optimizer in optimizers:
            peak = schedule.lr if isinstance(optimizer, torch.optim.AdamW) else schedule.matrix_lr
            assert peak is not None
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step) * peak / schedule.lr
        loss, note = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if done % 50 == 0 or done == schedule.steps:
            pace = (time.monotonic() - began) / (done - first)
            logger.info("%s %d/%d loss %.4f %s %.2f s/step", state.stem, done, schedule.steps, loss.item(), note, pace)
        if done % schedule.save_every == 0 or done == schedule.steps:
            _save(state, parameters, optimizers, done)


def _optimizers(module: nn.Module, schedule: Schedule) -> list[torch.optim.Optimizer]:
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    matrices: list[nn.Parameter] = []
    if schedule.matrix_lr is not None:
        matrices = [p for name, p in named.items() if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
    apart = {id(p) for p in matrices}
    others = [p for p in named.values() if id(p) not in apart]
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=schedule.lr, betas=(0.9, 0.98), weight_decay=schedule.weight_decay)
    ]
    if matrices:
        found.append(torch.optim.Muon(matrices, lr=schedule.lr, momentum=0.95, weight_decay=schedule.weight_decay))
    return found


def _save(state: Path, parameters: list[nn.Parameter], optimizers: list[torch.optim.Optimizer], step: int) -> None:
    state.parent.mkdir(parents=True, exist_ok=True)
    temporary = state.with_suffix(".partial")
    values = [p.detach() for p in parameters]
    torch.save({"parameters": values, "optimizers": [o.state_dict() for o in optimizers], "step": step}, temporary)
    os.replace(temporary, state)
