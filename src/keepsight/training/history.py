"""The model of a training run at every point of its training, from the weights that it kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepsight.results import RunDirectory, fingerprint
from keepsight.settings import read_yaml
from keepsight.training.arguments import STAGES
from keepsight.training.checkpoints import kept_weights, load_weights
from keepsight.training.config import TrainConfig
from keepsight.training.lora import adapt
from keepsight.training.recipe import build_model


@dataclass(frozen=True)
class Moment:
    """A point of a training: after `step` optimizer steps of `stage` ("" and 0: before the first)."""

    stage: str
    step: int
    folder: Path | None  # with the weights; None for the model that the run started from

    @property
    def name(self) -> str:
        """Such as "full-400", or "start"."""
        return f"{self.stage}-{self.step}" if self.stage else "start"


def moments(run: RunDirectory) -> list[Moment]:
    """The points of which a run kept the weights, in order, the start first.

    Raises:
        ValueError: if the run is no training or kept none.
    """
    if run.kind != "training":
        raise ValueError(f"'{run.path}' holds a {run.kind} run, not a training; give a folder of `keepsight train`.")
    config = read_yaml(TrainConfig, run.path / "config.yaml")
    found = [
        Moment(stage, step, folder)
        for stage in config.stages()
        for step, folder in kept_weights(run.path / STAGES / stage)
    ]
    if not found:
        raise ValueError(
            f"the run in '{run.path}' kept no weights on the way: train with keep_weights: true (--keep-weights) and "
            "save_steps as often as you want to look."
        )
    return [Moment("", 0, None), *found]


class ChangedModelError(ValueError):
    """The model that a run started from is no longer what it was."""


def starting_model(run: RunDirectory, config: TrainConfig) -> tuple[Any, Any]:
    """The model that a run started from, and its processor.

    Raises:
        ChangedModelError: its weights are others now, so that nothing the run kept fits it.
    """
    model, processor = build_model(config.model, seed=config.seed)
    before = run.info.get("model", {}).get("before")
    if before not in (None, fingerprint(model)):
        raise ChangedModelError(
            f"the model that '{run.info['model']['name']}' names is no longer the one that the run in '{run.path}' "
            "started from (its weights differ), so the checkpoint does not fit it. Restore the model."
        )
    return model, processor


def replay(run: RunDirectory, wanted: Callable[[Moment], bool]) -> Iterator[tuple[Moment, Any, Any]]:
    """The model (in place, so one at a time) and the processor at each wanted moment.

    Raises:
        ValueError: see `moments`.
        ChangedModelError: see `starting_model`.
    """
    config = read_yaml(TrainConfig, run.path / "config.yaml")
    chosen = [moment for moment in moments(run) if wanted(moment)]
    if not chosen:
        return
    model, processor = starting_model(run, config)
    adapted = False
    for moment in chosen:
        if moment.folder is not None:
            if not adapted and config.uses_lora(config.stages()[moment.stage]):
                adapt(model, config.lora, quantise=False)
                adapted = True
            load_weights(model, moment.folder, heads=False)
        yield moment, model.eval(), processor
